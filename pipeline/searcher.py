"""An index with its vectors and documents, memory-mapped: vectors in, documents out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from pipeline.collection import open_collection
from pipeline.document_files import Documents
from pipeline.manifest import Merged, OperatingPoint
from pipeline.recall import Matrix, Ordinals, exact_search

Rolled = TypeVar("Rolled")


@dataclass(frozen=True)
class Hit:
    """One answer. ``score`` is the cosine; documents with the same text are hits of their own with the same score."""

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
    """One answer of ``Searcher.texts``: a text, and the documents that have it as hits of the same rank and score."""

    rank: int
    score: float
    text: str
    documents: tuple[Hit, ...]


class Searcher:
    """Opens the data files of a local artifact folder; hashes nothing (``artifact.verify`` does).

    ``point``: the search settings used where a call names none; it may be set later.
    """

    def __init__(self, folder: Path, merged: Merged, point: OperatingPoint) -> None:
        self.point = point
        self.collection = open_collection(folder, merged)
        self.documents = Documents(folder, merged.documents)

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

    def search(
        self, queries: Matrix, k: int, *, nprobe: int | None = None, rescoring: int | None = None, exact: bool = False
    ) -> list[list[Hit]]:
        """The k best documents for each query vector, each by its best passage.

        Looks at more passages until k distinct documents are found or the index has no more.
        """
        lists = self.point.nprobe if nprobe is None else nprobe
        return self._deepened(
            queries, lambda scores, ordinals: self._roll_up(scores, ordinals, k), k, (lists, rescoring), exact=exact
        )

    def texts(
        self, queries: Matrix, k: int, point: OperatingPoint | None = None, *, without: str | None = None
    ) -> list[list[FoundText]]:
        """The k best texts for each query vector, each with all documents that have it and are not above it already.

        ``without``: a document that is left out, with all its passages.
        """
        point = point or self.point
        return self._deepened(
            queries,
            lambda scores, ordinals: self._texts(scores, ordinals, k, without),
            k,
            (point.nprobe, point.rescore),
            exact=False,
        )

    def _deepened(
        self,
        queries: Matrix,
        roll_up: Callable[[npt.NDArray[np.float32], Ordinals], list[Rolled]],
        k: int,
        settings: tuple[int, int | None],
        *,
        exact: bool,
    ) -> list[list[Rolled]]:
        """What ``roll_up`` makes of each query's passages, from more passages until it is k or the index has no more."""
        answers: list[list[Rolled]] = [[] for _ in queries]
        pending = np.arange(len(queries))
        depth, (lists, rescoring) = k, settings
        while len(pending):
            scores, ordinals = (
                self.exact_neighbours(queries[pending], depth)
                if exact
                else self.neighbours(queries[pending], depth, nprobe=lists, rescoring=rescoring)
            )
            found = ordinals >= 0
            for row, number in enumerate(pending):
                answers[number] = roll_up(scores[row][found[row]], ordinals[row][found[row]])
            short = np.array([len(answers[number]) < k for number in pending])
            if found.all():
                if depth >= len(self.collection.vectors):
                    break
                depth = min(2 * depth, len(self.collection.vectors))
            elif exact or lists >= self.collection.index.lists:
                break
            else:  # the lists visited hold fewer than asked: visit more
                lists = 2 * lists
            pending = pending[short]
        return answers

    def _roll_up(self, scores: npt.NDArray[np.float32], ordinals: Ordinals, k: int) -> list[Hit]:
        rows = self.documents.rows(ordinals)
        hits: list[Hit] = []
        seen: set[str] = set()
        for score, ordinal in zip(scores, ordinals, strict=True):
            for row in rows[int(ordinal)]:
                if row["doc_id"] not in seen and len(hits) < k:
                    seen.add(row["doc_id"])
                    hits.append(_hit(len(hits) + 1, float(score), row))
        return hits

    def _texts(self, scores: npt.NDArray[np.float32], ordinals: Ordinals, k: int, without: str | None) -> list[FoundText]:
        rows = self.documents.rows(ordinals)
        texts: list[FoundText] = []
        seen = {without}
        for score, ordinal in zip(scores, ordinals, strict=True):
            documents = []
            for row in rows[int(ordinal)]:
                if row["doc_id"] not in seen:
                    seen.add(row["doc_id"])
                    documents.append(_hit(len(texts) + 1, float(score), row))
            if documents:
                texts.append(FoundText(len(texts) + 1, float(score), documents[0].text, tuple(documents)))
            if len(texts) == k:
                break
        return texts


def _hit(rank: int, score: float, row: dict[str, Any]) -> Hit:
    names = ("doc_id", "passage", "start", "end", "text", "source_uri", "source_row", "metadata")
    return Hit(rank, score, *(row[name] for name in names))
