"""Queries in, documents out: the rankings of an artifact's partitions, merged, fused and rolled up to documents."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from pipeline.ann.recall import Matrix, Ordinals
from pipeline.errors import ConfigError
from pipeline.root.manifest import Merged, OperatingPoint
from pipeline.search.filters import AnyFilter
from pipeline.search.fusion import Fusion, fuse
from pipeline.search.partition import Depth, Found, Partition, Row, best_of

Mode = Literal["dense", "lexical", "hybrid"]
Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""How a function is called with each of several values: ``map``, or that of a pool of threads."""
FUSED_DEPTH = 100
"""Passages of each ranking that are fused, at least: what one ranking has on top, the other may have far below."""


@dataclass(frozen=True)
class Hit:
    """A document. ``score`` is that of its text: the cosine, or what ``Ask.mode`` makes it."""

    rank: int
    score: float
    doc_id: str
    passage: int
    start: int
    end: int
    text: str
    source_uri: str
    source_row: int
    metadata: str | None


@dataclass(frozen=True)
class FoundText:
    """One answer: a text, and the documents that have it as hits of the same rank and score.

    ``scores``: by ranking (dense: cosine, lexical: BM25, hybrid: fused), of those that have found it.
    """

    rank: int
    score: float
    text: str
    documents: tuple[Hit, ...]
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Queries:
    """What is asked for: (q, dim) unit vectors, texts, or both; ``hybrid`` needs both, ``dense`` vectors, ``lexical`` texts."""

    vectors: Matrix | None = None
    texts: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.vectors if self.vectors is not None else self.texts or ())

    @classmethod
    def joined(cls, several: "Sequence[Queries]") -> "Queries":
        """Those of several askers one after the other; without what one of them has not."""
        vectors, texts = [each.vectors for each in several], [each.texts for each in several]
        return cls(
            None if any(each is None for each in vectors) else np.concatenate(cast(list[Matrix], vectors)),
            None if any(each is None for each in texts) else [text for each in texts for text in each or ()],
        )

    def at(self, rows: Sequence[int]) -> "Queries":
        """Some of them."""
        vectors = None if self.vectors is None else self.vectors[list(rows)]
        return Queries(vectors, None if self.texts is None else [self.texts[row] for row in rows])


@dataclass(frozen=True)
class Ask:
    """How it is asked. ``k``: texts. ``point``: default the searcher's own. ``exact``: by brute force, dense only.

    ``group``: each document once, by its best passage, or every passage. ``without``: a document that is left out.
    ``dense_weight``: share of the dense ranking in ``hybrid``.
    """

    k: int
    point: OperatingPoint | None = None
    mode: Mode = "dense"
    filter: AnyFilter | None = None
    group: Literal["document", "passage"] = "document"
    without: str | None = None
    fusion: Fusion = "rrf"
    dense_weight: float = 0.5
    exact: bool = False


class Searcher:
    """Asks the partitions of an artifact and makes one answer of theirs.

    ``point``: the search settings used where a call names none; it may be set later. ``each``: how partitions are asked, one
    after the other or side by side.
    """

    def __init__(self, partitions: Sequence[Partition], merged: Merged, point: OperatingPoint, each: Each = map) -> None:
        self.point = point
        self.has_lexical = merged.lexical is not None
        self._partitions = partitions
        self._each = each

    def search(self, vectors: Matrix, k: int, *, exact: bool = False) -> list[list[Hit]]:
        """The k best documents for each query vector, each by its best passage; those of one text have one score."""
        answers = self.ask(Queries(vectors), Ask(k, exact=exact))
        return [documents(found)[:k] for found in answers]

    def ask(self, queries: Queries, ask: Ask) -> list[list[FoundText]]:
        """The k best texts for each query, each with all documents that have it and are not above it already.

        Looks at more passages until k are found or there are no more. Raises ConfigError where the artifact has not what is
        asked for.
        """
        answers: list[list[FoundText]] = [[] for _ in range(len(queries))]
        pending = list(range(len(queries)))
        depth, lists = ask.k, (ask.point or self.point).nprobe
        while pending:
            ranked = self._ranked(queries.at(pending), ask, depth, lists)
            short = []
            for number, ranking, texts in zip(pending, ranked, self._rolled_up(ranked, ask), strict=True):
                answers[number] = texts
                if len(texts) < ask.k and not ranking.is_all:
                    short.append(number)
            pending, depth, lists = short, 2 * depth, 2 * lists
        return answers

    def vector_of(self, doc_id: str, passage: int) -> Matrix | None:
        """The stored vector of a document's passage, (1, dim); None where there is none. Reads the ids of all documents."""
        vectors = self._of_each(lambda partition: partition.vector_of(doc_id, passage))
        return next((vector for vector in vectors if vector is not None), None)

    def _of_each(self, question: Callable[[Partition], Any]) -> list[Any]:
        return list(self._each(question, self._partitions))

    def _ranked(self, queries: Queries, ask: Ask, depth: int, lists: int) -> "list[_Ranked]":
        """The passages of each query: ``depth`` or all that can be found, of each ranking that ``ask.mode`` needs."""
        if ask.mode == "hybrid":
            depth = max(depth, FUSED_DEPTH)
        dense = self._dense(queries, ask, depth, lists) if ask.mode != "lexical" else []
        lexical = self._lexical(queries, ask, depth) if ask.mode != "dense" else []
        if ask.mode != "hybrid":
            return dense or lexical
        weights = (ask.dense_weight, 1 - ask.dense_weight)
        return [_fused(pair, weights, ask.fusion) for pair in zip(dense, lexical, strict=True)]

    def _dense(self, queries: Queries, ask: Ask, depth: int, lists: int) -> "list[_Ranked]":
        vectors = queries.vectors
        if vectors is None:
            raise ConfigError(f"mode {ask.mode}: needs vectors of the queries")
        deep = Depth(depth, lists, (ask.point or self.point).rescore, ask.exact)
        return _by_query("dense", self._of_each(lambda each: each.dense(vectors, deep, ask.filter)), depth)

    def _lexical(self, queries: Queries, ask: Ask, depth: int) -> "list[_Ranked]":
        texts = queries.texts
        if texts is None:
            raise ConfigError("mode: lexical and hybrid search need texts, vectors have no words")
        return _by_query("lexical", self._of_each(lambda each: each.lexical(texts, depth, ask.filter)), depth)

    def _rolled_up(self, ranked: "Sequence[_Ranked]", ask: Ask) -> list[list[FoundText]]:
        """The texts of each ranking, whose documents are read for all of them together."""
        answers = [_Answer(each, ask) for each in ranked]
        while wanted := {ordinal for answer in answers for ordinal in answer.wanted()}:
            rows = self._rows(np.array(sorted(wanted)), ask)
            for answer in answers:
                answer.take(rows)
        return [answer.texts for answer in answers]

    def _rows(self, ordinals: Ordinals, ask: Ask) -> dict[int, list[Row]]:
        held = [each.ordinals for each in self._partitions]
        chosen = [ordinals[(ordinals >= own.start) & (ordinals < own.stop)] for own in held]
        asked = [(each, mine) for each, mine in zip(self._partitions, chosen, strict=True) if len(mine)]
        found = self._each(lambda one: one[0].rows(one[1], ask.filter), asked)
        return {ordinal: rows for part in found for ordinal, rows in part.items()}


@dataclass(frozen=True)
class _Ranked:
    """One query's passages, best first. ``parts``: scores of ordinals in each ranking; ``is_all``: there are no more."""

    scores: npt.NDArray[np.float32]
    ordinals: Ordinals
    parts: dict[str, dict[int, float]]
    is_all: bool

    def scores_of(self, ordinal: int) -> dict[str, float]:
        return {name: scores[ordinal] for name, scores in self.parts.items() if ordinal in scores}


def _by_query(name: str, found: Sequence[Found], depth: int) -> list[_Ranked]:
    """The ranking of each query over all partitions."""
    best = best_of(found, depth)
    ranked = []
    for scores, ordinals, is_all in zip(best.scores, best.ordinals, best.is_all.tolist(), strict=True):
        count = int(np.count_nonzero(ordinals >= 0))
        scored = dict(zip(ordinals[:count].tolist(), scores[:count].tolist(), strict=True))
        ranked.append(_Ranked(scores[:count], ordinals[:count], {name: scored}, is_all))
    return ranked


def _fused(pair: tuple[_Ranked, _Ranked], weights: tuple[float, float], how: Fusion) -> _Ranked:
    scores, ordinals = fuse([(each.scores, each.ordinals) for each in pair], weights, how)
    parts = pair[0].parts | pair[1].parts | {"hybrid": dict(zip(ordinals.tolist(), scores.tolist(), strict=True))}
    return _Ranked(scores, ordinals, parts, all(each.is_all for each in pair))


class _Answer:
    """The texts of one ranking, made from its top as far as ``ask.k`` needs it."""

    def __init__(self, ranked: _Ranked, ask: Ask) -> None:
        self.texts: list[FoundText] = []
        self._ranked = ranked
        self._ask = ask
        self._seen = {ask.without}
        self._place = 0

    def wanted(self) -> list[int]:
        """The ordinals whose documents come next; none when all is there."""
        missing = self._ask.k - len(self.texts)
        return cast(list[int], self._ranked.ordinals[self._place : self._place + missing].tolist())

    def take(self, rows: dict[int, list[Row]]) -> None:
        """Go on with the documents of the ordinals that were wanted."""
        for ordinal in self.wanted():
            score = float(self._ranked.scores[self._place])
            self._place += 1
            hits = []
            for row in rows[ordinal]:
                if row["doc_id"] not in self._seen:
                    if self._ask.group == "document":
                        self._seen.add(row["doc_id"])
                    hits.append(_hit(len(self.texts) + 1, score, row))
            if hits:
                scores = self._ranked.scores_of(ordinal)
                self.texts.append(FoundText(len(self.texts) + 1, score, hits[0].text, tuple(hits), scores))


def documents(texts: Sequence[FoundText]) -> list[Hit]:
    """The documents of answers in their order, as hits of their own."""
    hits = [hit for text in texts for hit in text.documents]
    return [replace(hit, rank=rank) for rank, hit in enumerate(hits, 1)]


def _hit(rank: int, score: float, row: Row) -> Hit:
    names = ("doc_id", "passage", "start", "end", "text", "source_uri", "source_row", "metadata")
    return Hit(rank, score, *(row[name] for name in names))
