"""An index with its texts and documents, memory-mapped: queries in, documents out."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.collection import open_collection
from pipeline.document_files import Documents
from pipeline.errors import ConfigError
from pipeline.filters import METADATA, AnyFilter, Metadata, Passing
from pipeline.fusion import Fusion, fuse
from pipeline.lexical import Lexical
from pipeline.manifest import Merged, OperatingPoint
from pipeline.recall import Matrix, Ordinals, exact_search

Mode = Literal["dense", "lexical", "hybrid"]
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
    """Opens the data files of a local artifact folder; hashes nothing (``artifact.verify`` does).

    ``point``: the search settings used where a call names none; it may be set later.
    """

    def __init__(self, folder: Path, merged: Merged, point: OperatingPoint) -> None:
        self.point = point
        self.collection = open_collection(folder, merged)
        self.documents = Documents(folder, merged.documents)
        self.lexical = Lexical(folder, merged.lexical, len(self.collection.vectors)) if merged.lexical else None
        self.metadata = Metadata(folder / METADATA, merged.columns) if merged.columns else None

    def neighbours(
        self, queries: Matrix, k: int, *, nprobe: int | None = None, rescoring: int | None = None
    ) -> tuple[Matrix, Ordinals]:
        """Scores and ordinals of the k nearest passages, (q, k), -1 padded; settings default to the measured point."""
        nprobe = self.point.nprobe if nprobe is None else nprobe
        rescoring = self.point.rescore if rescoring is None else rescoring
        return self.collection.search(queries, k, nprobe=nprobe, rescoring=rescoring)

    def exact_neighbours(self, queries: Matrix, k: int) -> tuple[Matrix, Ordinals]:
        """The same by brute force over the stored vectors."""
        return exact_search(self.collection.vectors, queries, k)

    def search(self, vectors: Matrix, k: int, *, exact: bool = False) -> list[list[Hit]]:
        """The k best documents for each query vector, each by its best passage; those of one text have one score."""
        answers = self.ask(Queries(vectors), Ask(k, exact=exact))
        return [documents(found)[:k] for found in answers]

    def ask(self, queries: Queries, ask: Ask) -> list[list[FoundText]]:
        """The k best texts for each query, each with all documents that have it and are not above it already.

        Looks at more passages until k are found or there are no more. Raises ConfigError where the artifact has not what is
        asked for.
        """
        passing = self._passing(ask.filter)
        answers: list[list[FoundText]] = [[] for _ in range(len(queries))]
        pending = [] if passing is not None and not passing.count else list(range(len(queries)))
        depth, lists = ask.k, (ask.point or self.point).nprobe
        while pending:
            ranked = self._ranked(queries.at(pending), ask, passing, depth, lists)
            short = []
            for number, ranking in zip(pending, ranked, strict=True):
                answers[number] = self._rolled_up(ranking, ask, passing)
                if len(answers[number]) < ask.k and not ranking.is_all:
                    short.append(number)
            pending, depth, lists = short, 2 * depth, 2 * lists
        return answers

    def _passing(self, wanted: AnyFilter | None) -> Passing | None:
        if wanted is None:
            return None
        if self.metadata is None:
            raise ConfigError("filter: the artifact has no metadata; name columns in corpus.metadata and run vecmill reindex")
        return self.metadata.passing(wanted, len(self.collection.vectors))

    def _ranked(self, queries: Queries, ask: Ask, passing: Passing | None, depth: int, lists: int) -> "list[_Ranked]":
        """The passages of each query: ``depth`` or all that can be found, of each ranking that ``ask.mode`` needs."""
        if ask.mode == "hybrid":
            depth = max(depth, FUSED_DEPTH)
        dense = self._dense(queries, ask, passing, depth, lists) if ask.mode != "lexical" else []
        lexical = self._lexical(queries, passing, depth) if ask.mode != "dense" else []
        if ask.mode != "hybrid":
            return dense or lexical
        weights = (ask.dense_weight, 1 - ask.dense_weight)
        return [_fused(pair, weights, ask.fusion) for pair in zip(dense, lexical, strict=True)]

    def _dense(self, queries: Queries, ask: Ask, passing: Passing | None, depth: int, lists: int) -> "list[_Ranked]":
        if queries.vectors is None:
            raise ConfigError(f"mode {ask.mode}: needs vectors of the queries")
        allowed, available = (passing.ordinals, passing.count) if passing else (None, len(self.collection.vectors))
        if ask.exact:
            scores, ordinals = self.exact_neighbours(queries.vectors, depth)
        else:
            rescoring = (ask.point or self.point).rescore
            scores, ordinals = self.collection.search(
                queries.vectors, depth, nprobe=lists, rescoring=rescoring, allowed=allowed
            )
        is_whole = ask.exact or lists >= self.collection.index.lists
        return [_one("dense", *row, available, is_whole=is_whole) for row in zip(scores, ordinals, strict=True)]

    def _lexical(self, queries: Queries, passing: Passing | None, depth: int) -> "list[_Ranked]":
        if self.lexical is None:
            raise ConfigError("mode: the artifact has no lexical index; set index.lexical: true and run vecmill reindex")
        if queries.texts is None:
            raise ConfigError("mode: lexical and hybrid search need texts, vectors have no words")
        scores, ordinals = self.lexical.search(queries.texts, depth, passing.ordinals if passing else None)
        count = len(self.collection.vectors)
        return [_one("lexical", *row, count, is_whole=True) for row in zip(scores, ordinals, strict=True)]

    def _rolled_up(self, ranked: "_Ranked", ask: Ask, passing: Passing | None) -> list[FoundText]:
        rows = self.documents.rows(ranked.ordinals)
        texts: list[FoundText] = []
        seen = {ask.without}
        for score, ordinal in zip(ranked.scores.tolist(), ranked.ordinals.tolist(), strict=True):
            found = rows[ordinal]
            if passing is not None:
                found = [row for row, passes in zip(found, passing.documents(ordinal), strict=True) if passes]
            hits = []
            for row in found:
                if row["doc_id"] not in seen:
                    if ask.group == "document":
                        seen.add(row["doc_id"])
                    hits.append(_hit(len(texts) + 1, score, row))
            if hits:
                texts.append(FoundText(len(texts) + 1, score, hits[0].text, tuple(hits), ranked.scores_of(ordinal)))
            if len(texts) == ask.k:
                break
        return texts


@dataclass(frozen=True)
class _Ranked:
    """One query's passages, best first. ``parts``: scores of ordinals in each ranking; ``is_all``: there are no more."""

    scores: npt.NDArray[np.float32]
    ordinals: Ordinals
    parts: dict[str, dict[int, float]]
    is_all: bool

    def scores_of(self, ordinal: int) -> dict[str, float]:
        return {name: scores[ordinal] for name, scores in self.parts.items() if ordinal in scores}


def _one(name: str, scores: npt.NDArray[np.float32], ordinals: Ordinals, available: int, *, is_whole: bool) -> _Ranked:
    """A row of a search, -1 padded. ``is_whole``: nothing more can be found where it is padded."""
    depth, count = len(ordinals), int(np.count_nonzero(ordinals >= 0))
    scores, ordinals = scores[:count], ordinals[:count]
    is_all = count >= available or (is_whole and count < depth)
    return _Ranked(scores, ordinals, {name: dict(zip(ordinals.tolist(), scores.tolist(), strict=True))}, is_all)


def _fused(pair: tuple[_Ranked, _Ranked], weights: tuple[float, float], how: Fusion) -> _Ranked:
    scores, ordinals = fuse([(each.scores, each.ordinals) for each in pair], weights, how)
    parts = pair[0].parts | pair[1].parts | {"hybrid": dict(zip(ordinals.tolist(), scores.tolist(), strict=True))}
    return _Ranked(scores, ordinals, parts, all(each.is_all for each in pair))


def documents(texts: Sequence[FoundText]) -> list[Hit]:
    """The documents of answers in their order, as hits of their own."""
    hits = [hit for text in texts for hit in text.documents]
    return [replace(hit, rank=rank) for rank, hit in enumerate(hits, 1)]


def _hit(rank: int, score: float, row: dict[str, Any]) -> Hit:
    names = ("doc_id", "passage", "start", "end", "text", "source_uri", "source_row", "metadata")
    return Hit(rank, score, *(row[name] for name in names))
