"""Vectors to texts and documents, from one artifact, as JSON; runs on a thread of the search pool."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np

from pipeline.encoding.batching import Vectors
from pipeline.errors import ConfigError
from pipeline.metrics import SEARCH_LATENCY
from pipeline.operations.exposition import Meters
from pipeline.search.reranking import Reranking
from pipeline.search.searcher import Ask, FoundText, Hit, Queries, documents
from pipeline.service.following import Served
from pipeline.service.refusals import RefusedError, wrong
from pipeline.service.schemas import (
    Content,
    DocumentOfHit,
    HitOut,
    Include,
    Result,
    SearchResponse,
    Source,
    VectorStoreResult,
    VectorStoreSearchResponse,
)

SHOWN_DOCUMENTS = 1000


@dataclass(frozen=True)
class Asked:
    """What belongs to one request on its way. ``reranking``: None for none, given up at ``until`` (perf_counter)."""

    served: Served
    model: str
    ask: Ask
    include: frozenset[Include]
    started: float
    meters: Meters
    reranking: Reranking | None = None
    until: float = math.inf

    @property
    def depth(self) -> int:
        """Texts that are found for each query."""
        return self.reranking.depth(self.ask.k) if self.reranking else self.ask.k

    def answer(self, found: list[list[FoundText]], truncated: Sequence[int], took: dict[str, float]) -> bytes:
        """A SearchResponse as JSON."""
        response = SearchResponse(
            artifact=self.served.version,
            model=self.model,
            took_ms={phase: round(1000 * seconds, 3) for phase, seconds in self.timed(took).items()},
            results=[
                Result(hits=[_hit(text, self.include) for text in texts], truncated=row in truncated)
                for row, texts in enumerate(found)
            ],
        )
        return response.model_dump_json(exclude_none=True).encode()

    def timed(self, took: dict[str, float]) -> dict[str, float]:
        """Seconds of each phase with the total, which the meters get too."""
        took = took | {"total": time.perf_counter() - self.started}
        for phase, seconds in took.items():
            self.meters.observe(SEARCH_LATENCY, seconds, phase=phase)
        return took


Found = list[list[FoundText]]
Shape = Callable[["Search", Found], bytes]


@dataclass(frozen=True)
class Search:
    """A request that has its queries. ``shape`` makes its answer of what was found; ``took``: seconds so far, by phase."""

    asked: Asked
    queries: Queries
    shape: Shape
    truncated: Sequence[int] = ()
    took: dict[str, float] = field(default_factory=dict)

    @property
    def company(self) -> object:
        """Requests that have this in common are searched as one; None: this one is not, others would only wait for it."""
        gains = self.asked.ask.mode != "lexical" and self.asked.reranking is None and len(self.queries) == 1
        return (id(self.asked.served), self.asked.ask) if gains else None


def answer(searches: Sequence[Search]) -> list[bytes]:
    """The answers to requests of one company; RefusedError 422 for a filter that the artifact has no columns for."""
    asked, began = searches[0].asked, time.perf_counter()
    try:
        found = asked.served.opened.searcher.ask(
            Queries.joined([search.queries for search in searches]), replace(asked.ask, k=asked.depth)
        )
    except ConfigError as error:
        raise wrong("filter", str(error).removeprefix("filter: ")) from error
    seconds, texts = time.perf_counter() - began, iter(found)
    return [_shaped(search, list(islice(texts, len(search.queries))), seconds) for search in searches]


def _shaped(search: Search, found: Found, seconds: float) -> bytes:
    asked, took = search.asked, search.took | {"search": seconds}
    if asked.reranking is not None and search.queries.texts is not None:
        began, ordered = time.perf_counter(), []
        for number, (query, texts) in enumerate(zip(search.queries.texts, found, strict=True)):
            share = (asked.until - time.perf_counter()) / (len(found) - number)
            ordered.append(asked.reranking.order(query, texts, asked.ask.k, max(share, 0.0)))
        found, took = ordered, took | {"rerank": time.perf_counter() - began}
    return search.shape(replace(search, took=took), found)


def ranked(search: Search, found: Found) -> bytes:
    """A SearchResponse: a ranking for each query."""
    return search.asked.answer(found, search.truncated, search.took)


def paged(threshold: float | None) -> Shape:
    """A VectorStoreSearchResponse: documents by their best score over queries that mean the same."""

    def page(search: Search, found: Found) -> bytes:
        search.asked.timed(search.took)
        best: dict[str, Hit] = {}
        for hit in sorted((hit for texts in found for hit in documents(texts)), key=lambda hit: -hit.score):
            if threshold is None or hit.score >= threshold:
                best.setdefault(hit.doc_id, hit)
        data = [_result(hit) for hit in list(best.values())[: search.asked.ask.k]]
        query = list(search.queries.texts or ())
        return VectorStoreSearchResponse(search_query=query, data=data).model_dump_json().encode()

    return page


def _result(hit: Hit) -> VectorStoreResult:
    return VectorStoreResult(
        file_id=hit.doc_id,
        filename=hit.source_uri,
        score=hit.score,
        attributes=json.loads(hit.metadata) if hit.metadata else {},
        content=[Content(text=hit.text)],
    )


def similar(wanted: Sequence[tuple[Asked, str, int]]) -> list[bytes]:
    """What is near a passage of each document, less that document; RefusedError 404 where there is none."""
    return [_similar(*each) for each in wanted]


def _similar(asked: Asked, doc_id: str, passage: int) -> bytes:
    searcher, began = asked.served.opened.searcher, time.perf_counter()
    vector = searcher.vector_of(doc_id, passage)
    if vector is None:
        raise RefusedError(
            404, "document_not_found", f"the index has no passage {passage} of a document with this id", "doc_id"
        )
    found = searcher.ask(Queries(vector), replace(asked.ask, without=doc_id))
    return asked.answer(found, (), {"search": time.perf_counter() - began})


def _hit(text: FoundText, include: frozenset[Include]) -> HitOut:
    return HitOut(
        rank=text.rank,
        score=text.score,
        scores=text.scores,
        doc_ids=[hit.doc_id for hit in text.documents],
        text=text.text if "text" in include else None,
        documents=[_document(hit, include) for hit in text.documents[:SHOWN_DOCUMENTS]],
    )


def _document(hit: Hit, include: frozenset[Include]) -> DocumentOfHit:
    return DocumentOfHit(
        id=hit.doc_id,
        passage=hit.passage,
        span=(hit.start, hit.end) if "span" in include else None,
        metadata=json.loads(hit.metadata) if hit.metadata and "metadata" in include else None,
        source=Source(uri=hit.source_uri, row=hit.source_row) if "source" in include else None,
    )


def unit(vectors: Sequence[Sequence[float]], dim: int) -> Vectors:
    """A request's vectors at unit length, float32 (n, dim); RefusedError 422 for one without direction or of another dim."""
    for number, vector in enumerate(vectors):
        if len(vector) != dim:
            raise wrong("vectors", f"vector {number} has {len(vector)} dimensions, the index has {dim}")
    found = np.array(vectors, dtype=np.float64)
    norms = np.linalg.norm(found, axis=1, keepdims=True)
    if not (np.isfinite(norms) & (norms > 0)).all():
        raise wrong("vectors", "a vector is zero or not finite")
    return np.asarray(found / norms, dtype=np.float32)
