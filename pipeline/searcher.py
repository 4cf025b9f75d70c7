"""An index with its vectors and documents, memory-mapped: vectors in, documents out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import index as faiss_index
from pipeline.manifest import OperatingPoint
from pipeline.recall import Matrix, Ordinals, exact_search, rescore

INDEX = "index.faiss"
VECTORS = "vectors.f16"
DOCUMENTS = "documents.parquet"


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

    def __init__(self, folder: Path, dim: int, point: OperatingPoint) -> None:
        self.point = point
        self.vectors = open_vectors(folder / VECTORS, dim)
        self.index = faiss_index.read(folder / INDEX, dim=dim, ntotal=len(self.vectors))
        self._documents = pq.ParquetFile(folder / DOCUMENTS, memory_map=True, page_checksum_verification=True)
        self._first_ordinals = _first_ordinals(self._documents.metadata)

    def neighbours(
        self, queries: Matrix, k: int, *, nprobe: int | None = None, rescoring: int | None = None
    ) -> tuple[Matrix, Ordinals]:
        """Scores and ordinals of the k nearest passages, (q, k), -1 padded; settings default to the measured point."""
        return search_vectors(
            self.index, self.vectors, queries, k,
            nprobe=self.point.nprobe if nprobe is None else nprobe,
            rescoring=self.point.rescore if rescoring is None else rescoring,
        )  # fmt: skip

    def exact_neighbours(self, queries: Matrix, k: int) -> tuple[Matrix, Ordinals]:
        """The same by brute force over the stored vectors."""
        return exact_search(self.vectors, queries, k)

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
                if depth >= len(self.vectors):
                    break
                depth = min(2 * depth, len(self.vectors))
            elif exact or lists >= faiss_index.lists(self.index):
                break
            else:  # the lists visited hold fewer than asked: visit more
                lists = 2 * lists
            pending = pending[short]
        return answers

    def _roll_up(self, scores: npt.NDArray[np.float32], ordinals: Ordinals, k: int) -> list[Hit]:
        rows = self.rows(ordinals)
        hits: list[Hit] = []
        seen: set[str] = set()
        for score, ordinal in zip(scores, ordinals, strict=True):
            for row in rows[int(ordinal)]:
                if row["doc_id"] not in seen and len(hits) < k:
                    seen.add(row["doc_id"])
                    hits.append(_hit(len(hits) + 1, float(score), row))
        return hits

    def rows(self, ordinals: Ordinals) -> dict[int, list[dict[str, Any]]]:
        """The rows of ``documents.parquet`` for each ordinal, by doc_id."""
        rows: dict[int, list[dict[str, Any]]] = {int(ordinal): [] for ordinal in ordinals}
        if not rows:
            return rows
        groups = sorted({group for ordinal in rows for group in self._groups_of(ordinal)})
        table = self._documents.read_row_groups(groups)
        wanted = np.isin(table.column("ordinal").to_numpy(), list(rows))
        for row in table.filter(pa.array(wanted)).to_pylist():
            rows[row["ordinal"]].append(row)
        return rows

    def _groups_of(self, ordinal: int) -> range:
        """Row groups that may hold an ordinal; many documents with one text can span several."""
        first = int(np.searchsorted(self._first_ordinals, ordinal, side="left"))
        last = int(np.searchsorted(self._first_ordinals, ordinal, side="right"))
        return range(max(0, first - 1), last)


def open_vectors(file: Path, dim: int) -> npt.NDArray[np.float16]:
    """Memory-map ``vectors.f16`` as (n, dim)."""
    return np.memmap(file, dtype="<f2", mode="r").reshape(-1, dim) if file.stat().st_size else np.empty((0, dim), np.float16)


def search_vectors(
    index: Any, vectors: npt.NDArray[np.float16], queries: Matrix, k: int, *, nprobe: int, rescoring: int
) -> tuple[Matrix, Ordinals]:
    """Search an index and re-score ``rescoring`` candidates per asked neighbour exactly (0: keep the index's scores)."""
    if rescoring == 0:
        return faiss_index.search(index, queries, k, nprobe)
    depth = min(k * rescoring, len(vectors))
    _, candidates = faiss_index.search(index, queries, depth, nprobe)
    scores, ordinals = rescore(vectors, queries, candidates, k)
    return scores, np.where(np.isfinite(scores), ordinals, -1)


def _hit(rank: int, score: float, row: dict[str, Any]) -> Hit:
    names = ("doc_id", "passage", "start", "end", "text", "source_uri", "source_row", "metadata")
    return Hit(rank, score, *(row[name] for name in names))


def _first_ordinals(metadata: Any) -> npt.NDArray[np.int64]:
    column = metadata.schema.names.index("ordinal")
    firsts = [metadata.row_group(group).column(column).statistics.min for group in range(metadata.num_row_groups)]
    return np.asarray(cast(list[int], firsts), dtype=np.int64)
