"""The best texts of an answer in the order of a re-ranker, which one caller at a time may ask."""

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pipeline.config import SearchConfig
from pipeline.errors import ConfigError
from pipeline.search.searcher import FoundText

NOT_NAMED = "rerank: the config names no re-ranker; set search.reranker"


def named(settings: SearchConfig) -> str:
    """``search.reranker``; raises ConfigError where there is none."""
    if settings.reranker is None:
        raise ConfigError(NOT_NAMED)
    return settings.reranker


class Reranking:
    """The re-ranker of a config, loaded at its first use. Callers on several threads wait for each other."""

    def __init__(self, settings: SearchConfig, *, trust_remote_code: bool = False) -> None:
        self._settings = settings
        self._trusted = trust_remote_code
        self._reranker: Any = None
        self._lock = threading.Lock()

    @property
    def is_named(self) -> bool:
        """Whether the config names one."""
        return self._settings.reranker is not None

    def depth(self, k: int) -> int:
        """Texts to find so that k are left when the best are ordered anew."""
        return max(k, self._settings.rerank_depth)

    def load(self) -> None:
        """Load it now. Raises ConfigError where there is none, what ``load_reranker`` raises else."""
        with self._lock:
            self._loaded()

    def order(self, query: str, found: Sequence[FoundText], k: int, budget_s: float = math.inf) -> list[FoundText]:
        """The k best: of ``search.rerank_depth`` the best first, then what was not scored in time.

        That is within ``search.rerank_ms``, and within ``budget_s`` seconds from now, the wait for other callers included.
        """
        from pipeline.search.reranker import rerank

        until = time.perf_counter() + budget_s
        with self._lock:
            top = list(found[: self._settings.rerank_depth])
            within = min(until - time.perf_counter(), (self._settings.rerank_ms or math.inf) / 1000)
            texts = [text.text for text in top]
            scores = self._loaded().score(query, texts, budget_s=None if math.isinf(within) else within)
        scored = [
            text if math.isnan(score) else replace(text, score=score, scores=text.scores | {"rerank": score})
            for text, score in zip(top, scores.tolist(), strict=True)
        ]
        ordered = [scored[place] for place in rerank(scores).tolist()] + list(found[len(top) :])
        return [_ranked(text, rank) for rank, text in enumerate(ordered[:k], 1)]

    def _loaded(self) -> Any:
        model = named(self._settings)
        if self._reranker is None:
            from pipeline.search.reranker import load_reranker

            self._reranker = load_reranker(model, self._settings.reranker_revision, trust_remote_code=self._trusted)
        return self._reranker


def _ranked(text: FoundText, rank: int) -> FoundText:
    hits = tuple(replace(hit, rank=rank, score=text.score) for hit in text.documents)
    return replace(text, rank=rank, documents=hits)
