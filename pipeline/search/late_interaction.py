"""Late interaction (ColBERT, arXiv 2004.12832): a text is the vectors of its tokens, computed at query time.

The score of a text is the sum, over the tokens of the query, of the cosine to the nearest token of the text (MaxSim). What is
a token, and what counts, says the model: prompts, expansion of queries, words that are skipped.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from pipeline.encoding import torch_engine
from pipeline.encoding.batching import pad
from pipeline.encoding.tokenizer import CHARS_PER_TOKEN


class Read(NamedTuple):
    """Token ids of a text, and the vectors of the query's tokens that it is compared with, a tensor (tokens, dim)."""

    ids: list[int]
    query: Any


class LateInteraction:
    """See reranker.Scoring. ``model``: a MultiVectorEncoder in FP32."""

    def __init__(self, model: Any, max_tokens: int, precision: str) -> None:
        self._model = model
        self._pad_id = int(model.tokenizer.pad_token_id or 0)
        self._chars = CHARS_PER_TOKEN * max_tokens
        self._multiple = torch_engine.width_multiple()
        self._query: tuple[str, Any] | None = None
        prompts = [text or "" for text in model.prompts.values()]
        special = model.tokenizer.all_special_tokens
        # a text that spells out a special token has the characters it is made of, as everywhere (see tokenizer)
        model.tokenizer.split_special_tokens = not any(each in text for each in special for text in prompts)
        torch_engine.lower(model[0], torch_engine.DTYPES[precision])
        model[0].register_forward_hook(_in_fp32)

    def read(self, query: str, texts: Sequence[str]) -> list[Read]:
        """The tokens of each text. Characters beyond 64 per token of the limit are not read."""
        features = self._model.preprocess(
            [text[: self._chars] for text in texts], prompt=self._prompt("document"), task="document"
        )
        vectors = self._vectors(query)
        kept = features["attention_mask"].bool()
        return [Read(ids[mask].tolist(), vectors) for ids, mask in zip(features["input_ids"], kept, strict=True)]

    def score(self, batch: Sequence[Read]) -> Any:
        """A tensor of one score for each text; all of one query."""
        ids, mask = pad([each.ids for each in batch], self._pad_id, multiple=self._multiple)
        device = self._model.device
        features = {"input_ids": torch_engine.send(ids, device), "attention_mask": torch_engine.send(mask, device)}
        features = self._model(features, task="document")
        counted = features["attention_mask"].bool()
        return self._model.similarity([batch[0].query], features["token_embeddings"], b_mask=counted)[0]

    def _vectors(self, query: str) -> Any:
        """Of the tokens of a query; those of the last one are kept, a ranking is read in several goes."""
        if self._query is None or self._query[0] != query:
            text = query[: self._chars]
            self._query = query, self._model.encode_query([text], prompt=self._prompt("query"), show_progress_bar=False)[0]
        return self._query[1]

    def _prompt(self, side: str) -> str | None:
        return self._model.prompts.get(side) or None


def _in_fp32(_: Any, __: Any, features: dict[str, Any]) -> dict[str, Any]:
    return features | {"token_embeddings": features["token_embeddings"].float()}
