"""A cross-encoder: query and text read together, one score for the pair.

It runs in the machine's fastest arithmetic but for the last layer, whose scores would tie in 16 bits. Takes only models that
read a plain pair and give one number.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from torch.nn import Linear

from pipeline.encoding import torch_engine
from pipeline.encoding.batching import pad
from pipeline.encoding.tokenizer import Pair, PairTokenizer
from pipeline.errors import ConfigError

PROBE = ("Do tokenizer and model agree?", "They must: Ünïcode, 数学 and emoji 🙂 too.")


class CrossEncoding:
    """See reranker.Scoring. ``model``: a CrossEncoder in FP32 with one output, saved in ``path``."""

    def __init__(self, model: Any, path: Path, max_tokens: int, precision: str) -> None:
        """Raises ConfigError for one that reads other tokens than those of a plain pair."""
        self._model = model
        self._pad_id = int(model.tokenizer.pad_token_id or 0)
        self._prompt = model.prompts.get(model.default_prompt_name) or "" if model.default_prompt_name else ""
        self._tokenizer = PairTokenizer(path, max_tokens)
        self._has_types = self._check_tokens(path)
        self._multiple = torch_engine.width_multiple()
        _lower(model, torch_engine.DTYPES[precision])

    def read(self, query: str, texts: Sequence[str]) -> list[Pair]:
        """Query and text in one row of tokens, for each text."""
        return self._tokenizer(self._prompt + query, texts)

    def score(self, batch: Sequence[Pair]) -> Any:
        """A tensor of one score for each row."""
        ids, mask = pad([pair.ids for pair in batch], self._pad_id, multiple=self._multiple)
        arrays = {"input_ids": ids, "attention_mask": mask}
        if self._has_types:
            arrays["token_type_ids"] = pad([pair.types for pair in batch], 0, multiple=self._multiple)[0]
        features = {name: torch_engine.send(array, self._model.device) for name, array in arrays.items()}
        scores = torch_engine.through(self._model.children(), features)["scores"]
        return self._model.activation_fn(scores).squeeze(1)

    def _check_tokens(self, path: Path) -> bool:
        """Whether the model takes token types; raises ConfigError when it reads other tokens than the tokenizer here gives."""
        theirs = self._model.preprocess([PROBE], prompt=self._prompt or None)
        types = theirs.get("token_type_ids")
        (ours,) = self.read(*PROBE[:1], PROBE[1:])
        expected = theirs["input_ids"][0].tolist(), ours.types if types is None else types[0].tolist()
        if (ours.ids, ours.types) != expected:
            raise ConfigError(
                f"search.reranker: {path}: reads other tokens than its tokenizer.json gives for a plain pair (a chat template?"
                "); name a cross-encoder that reads query and text as a pair"
            )
        return types is not None


def _lower(model: Any, dtype: Any) -> None:
    """Weights of the transformer in ``dtype``, but for the layer that gives the score: it stays in FP32."""
    first = next(model.children())
    heads = [module for module in first.modules() if isinstance(module, Linear) and module.out_features == 1]
    torch_engine.lower(first, dtype, but_for={id(weights) for head in heads for weights in head.parameters()})
    for head in heads:
        head.register_forward_pre_hook(lambda _, inputs: tuple(cast(Any, value).float() for value in inputs))
