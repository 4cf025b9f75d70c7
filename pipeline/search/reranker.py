"""Texts in the order of a model that reads them at query time: a cross-encoder, or one of late interaction.

What is read is packed as an encoder's texts are, into batches of a token budget. With a time box the ranking is scored from
its top, so that what is scored is always its beginning.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.encoding.batching import Lengths, lengths_of, pack_batches, run_within
from pipeline.encoding.calibration import BUDGETS
from pipeline.encoding.model import UNLIMITED_TOKENS, max_positions, overflows
from pipeline.encoding.model_files import (
    CROSS_ENCODER,
    LATE_INTERACTION,
    check_code,
    check_pinned,
    check_weights,
    kind_of,
    locate,
)
from pipeline.encoding.numerics import on_gpu, resolve_precision
from pipeline.errors import ConfigError

Scores = npt.NDArray[np.float32]
"""(n,), one per text, higher is better; NaN: not scored."""

KEYS = ("search.reranker", "search.reranker_revision")
MIN_TOKENS = 16
FIRST_TEXTS, BLOCK_TEXTS = 4, 16
"""Texts that are scored between two looks at the clock; the first few tell the pace."""


class Scoring(Protocol):
    """How a kind of model scores."""

    def read(self, query: str, texts: Sequence[str]) -> list[Any]:
        """What is run for each text, with its tokens as ``ids``."""

    def score(self, batch: Sequence[Any]) -> Any:
        """A tensor of the scores of some of what was read."""


class Reranker:
    """A loaded model. One caller at a time: not safe for concurrent calls."""

    def __init__(self, scoring: Scoring, max_tokens: int, precision: str) -> None:
        self.max_tokens = max_tokens
        self.precision = precision
        self.clock: Callable[[], float] = time.monotonic
        """Seconds; what a time box is measured by."""
        self._scoring = scoring
        self._budget = BUDGETS["cuda" if on_gpu() else "cpu"][0]

    def score(self, query: str, texts: Sequence[str], *, budget_s: float | None = None) -> Scores:
        """Float32 (n,), in the order of ``texts``, which come best first.

        A cross-encoder gives what CrossEncoder.predict does, a model of late interaction the MaxSim of MultiVectorEncoder.
        NaN for a text that has no finite score, does not fit into the GPU's memory, or is not reached within ``budget_s``
        seconds: then the scored texts are the first ones, and the time is kept but for what the first four may take.
        """
        if budget_s is None:
            return self._run(self._scoring.read(query, texts)) if texts else np.empty(0, dtype=np.float32)
        scores = np.full(len(texts), np.nan, dtype=np.float32)
        deadline = self.clock() + budget_s
        first, pace_s = 0, 0.0
        while first < len(texts) and (started := self.clock()) < deadline:
            read = self._scoring.read(query, texts[first : first + (BLOCK_TEXTS if first else FIRST_TEXTS)])
            costs = [self._padded(_lengths(read[:count])) for count in range(1, len(read) + 1)]
            count = max((count for count, cost in enumerate(costs, 1) if cost * pace_s <= deadline - started), default=0)
            if not count:
                break
            scores[first : first + count] = self._run(read[:count])
            pace_s = (self.clock() - started) / costs[count - 1]
            first += count
        return scores

    def _padded(self, lengths: Lengths) -> int:
        """Tokens that a run over texts of these lengths takes through the model, with padding."""
        ordered = np.sort(lengths)[::-1]
        return sum((end - first) * int(ordered[first]) for first, end in pack_batches(ordered, self._budget))

    def _run(self, read: Sequence[Any]) -> Scores:
        import torch

        lengths = _lengths(read)
        order = np.argsort(-lengths, kind="stable")
        ordered = [read[row] for row in order]

        def forward(first: int, end: int) -> Any:
            return self._scoring.score(ordered[first:end])

        scores = np.empty(len(read), dtype=np.float32)
        with torch.inference_mode():
            parts, self._budget = run_within(lengths[order], self._budget, forward, torch.OutOfMemoryError)
            lost = torch.full((1,), torch.nan)
            scores[order] = torch.cat([lost if part is None else part.cpu() for part in parts]).numpy()
        return np.where(np.isfinite(scores), scores, np.float32(np.nan))


def _lengths(read: Sequence[Any]) -> Lengths:
    return lengths_of([each.ids for each in read])


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
    """A model given as folder, ``package:<import name>/<folder>`` or hub id + revision; its kind is in its config.

    ``max_tokens``: of query and text together, of late interaction of each, special tokens included; default: what the model
    says. ``precision``: as an encoder's, without int8. ``activated``: scores of a cross-encoder through its own activation,
    such as a sigmoid. Raises ConfigError for a model of no such kind or a cross-encoder of another number of outputs than one,
    EncoderError for one that cannot be loaded.
    """
    import sentence_transformers

    from pipeline.encoding import torch_engine
    from pipeline.search.late_interaction import LateInteraction

    if trust_remote_code:
        check_pinned(model, revision)
    path = locate(model, revision, KEYS)
    kind = _kind(path)
    check_weights(path)
    if trust_remote_code:
        check_code(path)
    positions = max_positions(path)
    if max_tokens is not None and not MIN_TOKENS <= max_tokens <= positions:
        raise ConfigError(f"{KEYS[0]}: {max_tokens} tokens for {model}, which has {positions} positions; at least {MIN_TOKENS}")
    precision = resolve_precision(precision, on_gpu=on_gpu(), overflows=overflows(path))
    loaded = torch_engine.load(
        str(path), torch_engine.device(), trust_remote_code=trust_remote_code, kind=getattr(sentence_transformers, kind)
    )
    limit = max_tokens or int(min(loaded.max_seq_length or UNLIMITED_TOKENS, positions))
    if kind == CROSS_ENCODER:
        return Reranker(_cross_encoding(loaded, path, limit, precision, activated=activated), limit, precision)
    limit = min(limit, loaded[0].document_length or UNLIMITED_TOKENS)
    if max_tokens:
        loaded.max_seq_length, loaded[0].document_length = max_tokens, limit
    return Reranker(LateInteraction(loaded, limit, precision), limit, precision)


def _cross_encoding(model: Any, path: Path, limit: int, precision: str, *, activated: bool) -> Scoring:
    import torch

    from pipeline.search.cross_encoder import CrossEncoding

    if model.num_labels != 1:
        raise ConfigError(f"{KEYS[0]}: {path}: found {model.num_labels} outputs, expected one; name another cross-encoder")
    if not activated:
        model.activation_fn = torch.nn.Identity()
    return CrossEncoding(model, path, limit, precision)


def _kind(path: Path) -> str:
    """What a folder says that it is; ConfigError for an encoder, which loaded as one of these would get a random last layer."""
    kind = kind_of(path)
    if kind not in (CROSS_ENCODER, LATE_INTERACTION):
        raise ConfigError(
            f"{KEYS[0]}: {path}: found {kind}, expected a {CROSS_ENCODER} with one output or a {LATE_INTERACTION}; name one, "
            "or make one with vecmill train-reranker"
        )
    return kind
