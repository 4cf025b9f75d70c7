"""Asking an artifact in Python: ``pipeline.open_artifact(uri).search("a text")``. Loads the model at the first query."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.ann.operating import pick
from pipeline.ann.recall import Matrix
from pipeline.artifacts.live import Opened, open_live, open_uri, query_spec
from pipeline.config import Config, SearchConfig
from pipeline.encoding.model import EncoderSpec
from pipeline.errors import ConfigError
from pipeline.search.filters import AnyFilter, parse_filter
from pipeline.search.reranking import Reranking
from pipeline.search.searcher import Ask, FoundText, Hit, Mode, Queries, documents


class Artifact:
    """An open artifact; it is closed when nothing refers to it. Several threads may ask it, queries are encoded in turn."""

    def __init__(self, opened: Opened, config: Config | None = None) -> None:
        self.opened = opened
        self._settings = config.search if config else SearchConfig()
        self._spec = query_spec(opened, config)
        self._encoders: dict[EncoderSpec, Any] = {}
        self._lock = threading.Lock()
        trusted = config is not None and config.encoder.trust_remote_code
        self._reranking = Reranking(self._settings, trust_remote_code=trusted)

    @property
    def version(self) -> str:
        """Name of the artifact."""
        return self.opened.manifest.version

    @property
    def has_reranker(self) -> bool:
        """Whether the config names a re-ranker."""
        return self._reranking.is_named

    def encode(self, texts: Sequence[str]) -> Matrix:
        """Unit vectors of queries, (q, dim) float32."""
        with self._lock:
            return np.asarray(self._encoder(self._spec).encode_queries(list(texts)))

    def encode_documents(self, texts: Sequence[str]) -> Matrix:
        """Unit vectors of texts as the artifact would have them, (n, dim) float32, in this machine's best precision."""
        with self._lock:
            return np.asarray(self._encoder(replace(self._spec, query_model=None)).encode_documents(list(texts)))

    def _encoder(self, spec: EncoderSpec) -> Any:
        if spec not in self._encoders:
            from pipeline.encoder import load_query_encoder

            self._encoders[spec] = load_query_encoder(spec)
        return self._encoders[spec]

    def search(self, query: str, k: int | None = None, **how: Any) -> list[Hit]:
        """The k best documents, each by its best passage; ``how`` as in ``texts``."""
        k = k or self._settings.k
        return documents(self.texts([query], k, **how)[0])[:k]

    def texts(
        self,
        queries: Sequence[str],
        k: int | None = None,
        *,
        mode: Mode | None = None,
        filter: AnyFilter | dict[str, Any] | str | None = None,  # noqa: A002 - what the API calls it
        recall: float | None = None,
        latency_ms: float | None = None,
        rerank: bool = False,
    ) -> list[list[FoundText]]:
        """The k best texts of each query with the documents that have them. What is None is as the config says.

        ``filter``: see pipeline.search.filters. ``recall``, ``latency_ms``: the fastest, or best, measured settings for that.
        ``rerank``: by the re-ranker of the config. Raises ConfigError on an empty query and on what the artifact, or
        config, has not.
        """
        if not all(query.strip() for query in queries):
            raise ConfigError("search: the query is empty; give a text")
        point = self.opened.searcher.point
        if recall is not None or latency_ms is not None:
            point = pick(self.opened.manifest.evaluation.points, recall=recall, latency_ms=latency_ms)
        k = k or self._settings.k
        if rerank:
            self._reranking.load()
        ask = Ask(
            self._reranking.depth(k) if rerank else k,
            point,
            mode or self._settings.mode,
            parse_filter(filter) if isinstance(filter, str | dict) else filter,
            fusion=self._settings.fusion,
            dense_weight=self._settings.dense_weight,
        )
        vectors = self.encode(queries) if ask.mode != "lexical" else None
        found = self.opened.searcher.ask(Queries(vectors, queries), ask)
        if not rerank:
            return found
        return [self._reranking.order(query, texts, k) for query, texts in zip(queries, found, strict=True)]


def open_artifact(uri: str, config: Config | None = None) -> Artifact:
    """Open an artifact folder at any fsspec URI, checked by its hashes when it is copied here. Raises ConfigError.

    ``config``: search settings, keys of the store, and whether the artifact's model may run code of its own.
    """
    if config is None:
        return Artifact(open_uri(uri))
    trusted = config.encoder.trust_remote_code
    return Artifact(open_uri(uri, config.search, config.store, trust_remote_code=trusted), config)


def open_root(config: Config) -> Artifact:
    """Open what is live in a config's root. Raises ConfigError where nothing is."""
    return Artifact(open_live(config), config)
