"""An index with its vectors and documents, memory-mapped: vectors in, documents out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.collection import open_collection
from pipeline.document_files import Documents
from pipeline.manifest import Merged, OperatingPoint
from pipeline.recall import Matrix, Ordinals, exact_search


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
        answers: list[list[Hit]] = [[] for _ in queries]
        pending = np.arange(len(queries))
        depth, lists = k, self.point.nprobe if nprobe is None else nprobe
        while len(pending):
            scores, ordinals = (
                self.exact_neighbours(queries[pending], depth)
                if exact
                else self.neighbours(queries[pending], depth, nprobe=lists, rescoring=rescoring)
            )
            found = ordinals >= 0
            for row, number in enumerate(pending):
                answers[number] = self._roll_up(scores[row][found[row]], ordinals[row][found[row]], k)
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


def _hit(rank: int, score: float, row: dict[str, Any]) -> Hit:
    names = ("doc_id", "passage", "start", "end", "text", "source_uri", "source_row", "metadata")
    return Hit(rank, score, *(row[name] for name in names))
