"""A cross-encoder: query and text read together, to order the top of a ranking anew.

Pairs are packed as an encoder's texts are, into batches of a token budget, and run in the machine's fastest arithmetic
but for the last layer, whose scores would tie in 16 bits. With a time box the ranking is scored from its top, so that
what is scored is always its beginning. Takes only models that read a plain pair and give one number.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from pipeline.batching import Lengths, lengths_of, pack_batches, pad, run_within
from pipeline.encoder import BUDGETS
from pipeline.errors import ConfigError
from pipeline.model import UNLIMITED_TOKENS, max_positions, overflows
from pipeline.model_files import check_code, check_pinned, check_weights, locate, read_json
from pipeline.numerics import on_gpu, resolve_precision
from pipeline.tokenizer import Pair, PairTokenizer

Scores = npt.NDArray[np.float32]
"""(n,), one per text, higher is better; NaN: not scored."""

KEYS = ("search.reranker", "search.reranker_revision")
MIN_TOKENS = 16
FIRST_TEXTS, BLOCK_TEXTS = 4, 16
"""Texts that are scored between two looks at the clock; the first few tell the pace."""
PROBE = ("Do tokenizer and model agree?", "They must: Ünïcode, 数学 and emoji 🙂 too.")


class Reranker:
    """A loaded cross-encoder. One caller at a time: not safe for concurrent calls."""

    def __init__(self, model: Any, path: Path, max_tokens: int, precision: str) -> None:
        """``model``: a CrossEncoder in FP32 with one output, saved in ``path``. ``precision``: of its weights.

        Raises ConfigError for one that reads other tokens than those of a plain pair.
        """
        from pipeline import torch_engine

        self.max_tokens = max_tokens
        self.precision = precision
        self.clock: Callable[[], float] = time.monotonic
        """Seconds; what a time box is measured by."""
        self._on_gpu = torch_engine.has_cuda()
        self._multiple = torch_engine.GPU_WIDTH_MULTIPLE if self._on_gpu else 1
        self._budget = BUDGETS["cuda" if self._on_gpu else "cpu"][0]
        self._model = model
        self._pad_id = int(model.tokenizer.pad_token_id or 0)
        self._prompt = model.prompts.get(model.default_prompt_name) or "" if model.default_prompt_name else ""
        self._tokenizer = PairTokenizer(path, max_tokens)
        self._has_types = self._check_tokens(path)
        _lower(model, torch_engine.DTYPES[precision])

    def score(self, query: str, texts: Sequence[str], *, budget_s: float | None = None) -> Scores:
        """What CrossEncoder.predict gives for (query, text), float32 (n,), in the order of ``texts``, which come best first.

        NaN for a text that has no finite score, does not fit into the GPU's memory, or is not reached within ``budget_s``
        seconds: then the scored texts are the first ones, and the time is kept but for what the first four may take.
        """
        if budget_s is None:
            return self._run(self._pairs(query, texts))
        scores = np.full(len(texts), np.nan, dtype=np.float32)
        deadline = self.clock() + budget_s
        first, pace_s = 0, 0.0
        while first < len(texts) and (started := self.clock()) < deadline:
            pairs = self._pairs(query, texts[first : first + (BLOCK_TEXTS if first else FIRST_TEXTS)])
            costs = [self._padded(_lengths(pairs[:count])) for count in range(1, len(pairs) + 1)]
            count = max((count for count, cost in enumerate(costs, 1) if cost * pace_s <= deadline - started), default=0)
            if not count:
                break
            scores[first : first + count] = self._run(pairs[:count])
            pace_s = (self.clock() - started) / costs[count - 1]
            first += count
        return scores

    def _pairs(self, query: str, texts: Sequence[str]) -> list[Pair]:
        return self._tokenizer(self._prompt + query, texts)

    def _padded(self, lengths: Lengths) -> int:
        """Tokens that a run over texts of these lengths takes through the model, with padding."""
        ordered = np.sort(lengths)[::-1]
        return sum((end - first) * int(ordered[first]) for first, end in pack_batches(ordered, self._budget))

    def _run(self, pairs: Sequence[Pair]) -> Scores:
        import torch

        if not pairs:
            return np.empty(0, dtype=np.float32)
        lengths = _lengths(pairs)
        order = np.argsort(-lengths, kind="stable")
        ordered = [pairs[row] for row in order]

        def forward(first: int, end: int) -> Any:
            return self._forward(ordered[first:end])

        scores = np.empty(len(pairs), dtype=np.float32)
        with torch.inference_mode():
            parts, self._budget = run_within(lengths[order], self._budget, forward, torch.OutOfMemoryError)
            lost = torch.full((1,), torch.nan, device=self._model.device)
            scores[order] = torch.cat([lost if part is None else part for part in parts]).cpu().numpy()
        return np.where(np.isfinite(scores), scores, np.float32(np.nan))

    def _forward(self, batch: Sequence[Pair]) -> Any:
        ids, mask = pad([pair.ids for pair in batch], self._pad_id, multiple=self._multiple)
        arrays = {"input_ids": ids, "attention_mask": mask}
        if self._has_types:
            arrays["token_type_ids"] = pad([pair.types for pair in batch], 0, multiple=self._multiple)[0]
        features = {name: self._send(array) for name, array in arrays.items()}
        first, *rest = self._model.children()
        features = first(features)
        for name in {"token_embeddings", "sentence_embedding", "scores"} & features.keys():
            features[name] = features[name].float()
        for module in rest:
            features = module(features)
        return self._model.activation_fn(features["scores"]).squeeze(1)

    def _send(self, array: npt.NDArray[np.int64]) -> Any:
        import torch

        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self._model.device, non_blocking=True) if self._on_gpu else tensor

    def _check_tokens(self, path: Path) -> bool:
        """Whether the model takes token types; raises ConfigError when it reads other tokens than the tokenizer here gives."""
        theirs = self._model.preprocess([PROBE], prompt=self._prompt or None)
        types = theirs.get("token_type_ids")
        (ours,) = self._pairs(*PROBE[:1], PROBE[1:])
        expected = theirs["input_ids"][0].tolist(), ours.types if types is None else types[0].tolist()
        if (ours.ids, ours.types) != expected:
            raise ConfigError(
                f"{KEYS[0]}: {path}: reads other tokens than its tokenizer.json gives for a plain pair (a chat template?); "
                "name a cross-encoder that reads query and text as a pair"
            )
        return types is not None


def _lengths(pairs: Sequence[Pair]) -> Lengths:
    return lengths_of([pair.ids for pair in pairs])


def rerank(scores: Scores) -> npt.NDArray[np.int64]:
    """Positions of texts in their new order, (n,): by descending score, equal ones and then all unscored in the old order."""
    return np.argsort(-scores, kind="stable").astype(np.int64)  # NaN is sorted last


def load_reranker(
    model: str,
    revision: str | None = None,
    *,
    max_tokens: int | None = None,
    trust_remote_code: bool = False,
    precision: str = "auto",
    activated: bool = True,
) -> Reranker:
    """A cross-encoder given as folder, ``package:<import name>/<folder>`` or hub id + revision.

    ``max_tokens``: of query and text together, special tokens included; default: what the model says. ``precision``: as an
    encoder's, without int8. ``activated``: scores through the model's own activation, such as a sigmoid. Raises ConfigError
    for a model that is none or has another number of outputs than one, EncoderError for one that cannot be loaded.
    """
    import torch
    from sentence_transformers import CrossEncoder

    from pipeline import torch_engine

    if trust_remote_code:
        check_pinned(model, revision)
    path = locate(model, revision, KEYS)
    _check_kind(path)
    check_weights(path)
    if trust_remote_code:
        check_code(path)
    positions = max_positions(path)
    if max_tokens is not None and not MIN_TOKENS <= max_tokens <= positions:
        raise ConfigError(f"{KEYS[0]}: {max_tokens} tokens for {model}, which has {positions} positions; at least {MIN_TOKENS}")
    gpu = on_gpu()
    device = torch.device("cuda" if gpu else "cpu")
    loaded = torch_engine.load(str(path), device, trust_remote_code=trust_remote_code, kind=CrossEncoder)
    if loaded.num_labels != 1:
        raise ConfigError(f"{KEYS[0]}: {path}: found {loaded.num_labels} outputs, expected one; name another cross-encoder")
    if not activated:
        loaded.activation_fn = torch.nn.Identity()
    limit = max_tokens or min(loaded.max_seq_length or UNLIMITED_TOKENS, positions)
    return Reranker(loaded, path, limit, resolve_precision(precision, on_gpu=gpu, overflows=overflows(path)))


def _check_kind(path: Path) -> None:
    """Raise ConfigError unless a folder says that it is a cross-encoder: loaded as one, an encoder gets a random last layer."""
    if (path / "modules.json").is_file():
        kind = read_json(path / "config_sentence_transformers.json", missing={}).get("model_type", "SentenceTransformer")
    else:
        named = read_json(path / "config.json", missing={}).get("architectures") or ["no config.json with architectures"]
        kind = "CrossEncoder" if named[0].endswith("ForSequenceClassification") else named[0]
    if kind != "CrossEncoder":
        raise ConfigError(f"{KEYS[0]}: {path}: found {kind}, expected a CrossEncoder with one output; name a cross-encoder")


def _lower(model: Any, dtype: Any) -> None:
    """Weights of the transformer in ``dtype``, but for the layer that gives the score: it stays in FP32."""
    from torch.nn import Linear

    first = next(model.children())
    heads = [module for module in first.modules() if isinstance(module, Linear) and module.out_features == 1]
    exact = {id(weights) for head in heads for weights in head.parameters()}
    for weights in first.parameters():  # not the buffers: rotary frequencies in 16 bits garble long texts
        if id(weights) not in exact:
            weights.data = weights.data.to(dtype)
    for head in heads:
        head.register_forward_pre_hook(lambda _, inputs: tuple(cast(Any, value).float() for value in inputs))
