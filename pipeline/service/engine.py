"""A request's way through the service: texts to vectors, vectors to texts and documents, all from one artifact.

Knows nothing of HTTP but ``RefusedError``, so that uvicorn and Ray Serve run the same.
"""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import PurePosixPath
from typing import TypeVar

from pipeline import __version__
from pipeline.ann.operating import pick
from pipeline.artifacts.live import Elsewhere, Opened, open_uri, open_uri_elsewhere, query_spec
from pipeline.config import Config, SearchConfig, ServeConfig
from pipeline.errors import ConfigError
from pipeline.ingest.corpus import SURROGATES
from pipeline.metrics import SERVICE
from pipeline.operations.exposition import Meters
from pipeline.reports.report import HTML
from pipeline.search.reranking import NOT_NAMED, Reranking
from pipeline.search.searcher import Ask, Queries
from pipeline.service import answers
from pipeline.service.answers import Asked, Search, Shape, unit
from pipeline.service.following import Follower, fixed
from pipeline.service.query_encoder import QueryEncoder, QueryVectors
from pipeline.service.refusals import RefusedError, wrong
from pipeline.service.schemas import Include, Info, SearchRequest, VectorStoreSearchRequest
from pipeline.service.searches import Searches

Answer = TypeVar("Answer")
RERANKING_SHARE = 0.8
"""Re-ranking ends after so much of a request's time, with what it has: it must not go on when nobody waits any more."""
WAITING_SEARCHES = 32
"""Searches side by side by default where others do the work."""
LIVE = "live"
"""How OpenAI's clients call the artifact that serves: the id of a vector store."""
STORE_FIELDS = {"queries": "query", "k": "max_num_results", "filter": "filters"}
"""What fields of a SearchRequest are called in a VectorStoreSearchRequest."""


class Engine:
    """Loads the model and opens what is live, or the artifact at ``artifact``. Raises what those raise. ``close`` ends it.

    ``elsewhere``: for an artifact whose partitions are in other processes; searches then only wait, so more go side by side.
    """

    def __init__(self, config: Config | None, artifact: str | None = None, elsewhere: Elsewhere | None = None) -> None:
        self.limits = config.serve if config else ServeConfig()
        self.meters = Meters(SERVICE)
        self._search = config.search if config else SearchConfig()
        self._follower: Follower | None = None
        trusted = config is not None and config.encoder.trust_remote_code
        if artifact is not None:
            store = config.store if config else None
            opened: Opened
            if elsewhere is not None:
                opened = open_uri_elsewhere(artifact, self._search, store, elsewhere, trust_remote_code=trusted)
            else:
                opened = open_uri(artifact, self._search, store, trust_remote_code=trusted, verified=True)
            self.current = fixed(opened, self._search, self.meters)
        elif config is not None:
            self._follower = Follower(config, self.meters, elsewhere)
            self.current = self._follower.current
        else:
            raise ConfigError("serve: give -c FILE for the live artifact, or --artifact URI")
        self.encoder = QueryEncoder(query_spec(self.current.served.opened, config), self.limits.queue, self.meters)
        self.model = model_name(self.current.served.opened.spec.model)
        self._reranking = Reranking(self._search, trust_remote_code=trusted)
        if self._reranking.is_named:
            self._reranking.load()
        threads = self.limits.threads or (WAITING_SEARCHES if elsewhere else None)
        self._searches = Searches(threads, self.limits.queue, self.meters)
        if self._follower:
            self._follower.start()

    def close(self) -> None:
        """End the threads; requests at work are finished."""
        if self._follower:
            self._follower.close()
        self.encoder.close()
        self._searches.close()

    async def search(self, request: SearchRequest) -> bytes:
        """A SearchResponse as JSON."""
        return await self._searched(request, answers.ranked)

    async def vector_store_search(self, store: str, request: VectorStoreSearchRequest) -> bytes:
        """A VectorStoreSearchResponse as JSON. ``store``: ``live``, or the name of the artifact that serves."""
        version = self.current.served.version
        if store not in {LIVE, version}:
            raise RefusedError(404, "vector_store_not_found", f"{store[:100]} is not here, {LIVE} and {version} are", "id")
        rerank = self._reranking.is_named and request.ranking_options.ranker != "none"
        inner = SearchRequest(queries=request.query, k=request.max_num_results, filter=request.filters, rerank=rerank)
        try:
            return await self._searched(inner, answers.paged(request.ranking_options.score_threshold))
        except RefusedError as error:
            raise error.renamed(STORE_FIELDS) from error

    async def _searched(self, request: SearchRequest, shape: Shape) -> bytes:
        asked = self._asked(request.k, request.include, request)
        texts, took = request.texts, {}
        truncated: tuple[int, ...] = ()
        count = len(texts if texts is not None else request.vectors or ())
        self._check_count(count, "queries" if texts is not None else "vectors")
        if count * asked.depth > self.limits.max_hits:
            raise wrong("k", f"{count} queries times k {asked.depth} are more than {self.limits.max_hits} hits; ask for less")
        if texts is None:
            queries = Queries(unit(request.vectors or [], self.encoder.dim))
        elif asked.ask.mode == "lexical":
            self._check_texts(texts, "queries")
            queries = Queries(texts=texts)
        else:
            encoded = await self._encoded(texts, "queries", asked.started)
            queries, truncated = Queries(encoded.vectors, texts), encoded.truncated
            took = {"queue": encoded.queue_s, "encode": encoded.encode_s}
        search = Search(asked, queries, shape, truncated, took)
        return await self._within(self._searches.submit(answers.answer, search, search.company), asked.started)

    async def similar(self, doc_id: str, passage: int, k: int | None, include: Sequence[Include]) -> bytes:
        """A SearchResponse as JSON: what is near a passage of a document, less that document."""
        asked = self._asked(k, include, SearchRequest(vectors=[], mode="dense"))
        self._check_text(doc_id, "doc_id")
        return await self._within(self._searches.submit(answers.similar, (asked, doc_id, passage)), asked.started)

    async def embeddings(self, texts: Sequence[str]) -> QueryVectors:
        """Vectors of whole texts; RefusedError 400 where the model would read only the beginning of one."""
        self._check_count(len(texts), "input")
        encoded = await self._encoded(texts, "input", time.perf_counter())
        if encoded.truncated:
            message = f"input {encoded.truncated[0]} is longer than the model's {self.encoder.max_tokens} tokens; split it"
            raise RefusedError(400, "context_length_exceeded", message, "input")
        return encoded

    def info(self) -> Info:
        """What is served."""
        served = self.current.served
        manifest = served.opened.manifest
        limits = self.limits.model_dump(include={"max_queries", "max_query_chars", "max_k", "max_hits", "timeout_s"})
        return Info(
            artifact=served.version,
            commit=served.commit,
            created=manifest.created,
            model=self.model,
            dim=self.encoder.dim,
            max_tokens=self.encoder.max_tokens,
            passages=manifest.counts["passages"],
            documents=manifest.counts["documents"],
            modes=["dense", "lexical", "hybrid"] if manifest.lexical else ["dense"],
            mode=self._search.mode,
            rerank=self._reranking.is_named,
            columns=list(manifest.columns),
            recall=manifest.evaluation.recall,
            recall_k=manifest.evaluation.k,
            points=[point.model_dump() for point in manifest.evaluation.points],
            degraded=self.current.degraded is not None,
            reason=self.current.degraded,
            version=__version__,
            limits=limits | {"max_body_bytes": float(self.limits.max_body)},
        )

    def report(self) -> bytes:
        """The page about what is served, HTML; RefusedError 404 where the artifact has none."""
        opened = self.current.served.opened
        if HTML not in opened.manifest.report:
            raise RefusedError(404, "report_not_found", f"artifact {opened.manifest.version} has no {HTML}")
        return opened.files.read(HTML)

    def _asked(self, k: int | None, include: Sequence[Include], request: SearchRequest) -> Asked:
        """The request's frame: from here on it belongs to the artifact that serves now."""
        served = self.current.served
        if (k := k or min(self._search.k, self.limits.max_k)) > self.limits.max_k:
            raise wrong("k", f"k {k} is over the limit, {self.limits.max_k}; ask for less")
        point, manifest = served.point, served.opened.manifest
        if request.recall is not None or request.latency_ms is not None:
            try:
                point = pick(manifest.evaluation.points, recall=request.recall, latency_ms=request.latency_ms)
            except ConfigError as error:
                name = "recall" if request.recall is not None else "latency_ms"
                raise wrong(name, str(error).removeprefix("--")) from error
        mode = request.mode or ("dense" if request.vectors is not None else self._search.mode)
        if mode != "dense" and manifest.lexical is None:
            raise wrong("mode", f"{mode} needs a lexical index, and this artifact has none: index.lexical in its config")
        if mode != "dense" and request.vectors is not None:
            raise wrong("mode", f"{mode} needs queries as texts, vectors have no words")
        ask = Ask(k, point, mode, request.filter, request.group, None, self._search.fusion, self._search.dense_weight)
        if request.rerank and not self._reranking.is_named:
            raise wrong("rerank", NOT_NAMED.removeprefix("rerank: "))
        if request.rerank and request.vectors is not None:
            raise wrong("rerank", "a re-ranker needs queries as texts")
        started = time.perf_counter()
        reranking, until = self._reranking if request.rerank else None, started + RERANKING_SHARE * self.limits.timeout_s
        return Asked(served, self.model, ask, frozenset(include), started, self.meters, reranking, until)

    async def _encoded(self, texts: Sequence[str], param: str, started: float) -> QueryVectors:
        self._check_texts(texts, param)
        return await self._within(self.encoder.submit(texts), started)

    async def _within(self, future: "Future[Answer]", started: float) -> Answer:
        """What another thread makes; RefusedError 503 when the request takes too long: what has not begun is then left out."""
        try:
            async with asyncio.timeout(started + self.limits.timeout_s - time.perf_counter()):
                return await asyncio.wrap_future(future)
        except TimeoutError as error:
            raise RefusedError(503, "timeout", f"no answer within {self.limits.timeout_s:g} s; come again") from error

    def _check_count(self, count: int, param: str) -> None:
        if not 1 <= count <= self.limits.max_queries:
            raise wrong(param, f"{count} given, 1 to {self.limits.max_queries} are answered at once")

    def _check_texts(self, texts: Sequence[str], param: str) -> None:
        for text in texts:
            self._check_text(text, param)

    def _check_text(self, text: str, param: str) -> None:
        if not text.strip():
            raise wrong(param, "a text is empty; give a visible one")
        if len(text) > self.limits.max_query_chars:
            raise wrong(param, f"a text has {len(text)} characters, the limit is {self.limits.max_query_chars}; shorten it")
        if SURROGATES.search(text):
            raise wrong(param, "a text holds half of a surrogate pair, which is no character; send valid Unicode")


def model_name(model: str) -> str:
    """How the service calls a model: its id, of a local folder only the last part of the path."""
    return model if not model.startswith(("/", ".", "~")) else PurePosixPath(model).name
