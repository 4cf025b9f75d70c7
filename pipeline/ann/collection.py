"""The index of an artifact with the vectors that it points to: search, re-score, answer."""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.ann.index_parts import Parts
from pipeline.ann.recall import Matrix, Ordinals, exact_search, rescore, top
from pipeline.ann.vectors import INT8, VECTORS, Int8Vectors, Readahead, Vectors, gather, open_vectors
from pipeline.root.manifest import Merged

MIN_NEIGHBOURS = 10
"""A search for fewer looks as deep as one for so many: five candidates do not hold the one best."""
EXACT_FLOATS = 1 << 24
"""So many numbers are compared exactly in about 10 ms: 43,690 vectors of 384 dimensions."""
EXACT_ROWS = 1 << 14

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Collection:
    """``vectors``: (n, dim) float16 of a whole artifact, of which ``index`` may hold a range of ordinals.

    ``rescorer``: what candidates are re-scored from, None where nothing is.
    """

    index: Parts
    vectors: Vectors
    rescorer: Vectors | Int8Vectors | None
    readahead: Readahead | None = None

    def search(
        self, queries: Matrix, k: int, *, nprobe: int, rescoring: int, allowed: Mask | None = None
    ) -> tuple[Matrix, Ordinals]:
        """Scores and ordinals, (q, k), -1 padded; ``rescoring`` candidates per asked neighbour are scored again, 0: none.

        ``allowed``: (n,) by ordinal, what may be found. Of few the nearest are found exactly; of many, by visiting so many
        lists that as many vectors are looked at as without.
        """
        if allowed is not None:
            count = int(np.count_nonzero(allowed))
            if count * queries.shape[1] <= EXACT_FLOATS or not self.index.can_select:
                return self._nearest(queries, k, np.flatnonzero(allowed))
            nprobe = math.ceil(nprobe * len(self.index.ordinals) / count)
        if rescoring == 0 or self.rescorer is None:
            return self.index.search(queries, k, nprobe, allowed)
        depth = min(width(k, rescoring), len(self.index.ordinals))
        _, candidates = self.index.search(queries, depth, nprobe, allowed)
        with self.readahead.reading(candidates) if self.readahead else contextlib.nullcontext():
            scores, ordinals = rescore(self.rescorer, queries, candidates, k)
        return scores, np.where(np.isfinite(scores), ordinals, -1)

    def exact(self, queries: Matrix, k: int, allowed: Mask | None = None) -> tuple[Matrix, Ordinals]:
        """The same by brute force over the stored vectors."""
        if allowed is not None:
            return self._nearest(queries, k, np.flatnonzero(allowed))
        held = self.index.ordinals
        scores, rows = exact_search(self.vectors[held.start : held.stop], queries, k)
        return scores, rows + held.start

    def _nearest(self, queries: Matrix, k: int, chosen: Ordinals) -> tuple[Matrix, Ordinals]:
        """The k nearest of some ordinals by their stored vectors."""
        scores, ordinals = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
        for first in range(0, len(chosen), EXACT_ROWS):
            block = chosen[first : first + EXACT_ROWS]
            near = queries @ gather(self.vectors, block).T
            both = np.concatenate([scores, near], axis=1), np.concatenate([ordinals, np.tile(block, (len(queries), 1))], axis=1)
            scores, ordinals = top(*both, k)
        return scores, ordinals


def width(k: int, rescoring: int) -> int:
    """Candidates to look at for k neighbours."""
    return max(k, MIN_NEIGHBOURS) * rescoring if rescoring else k


def open_collection(folder: Path, merged: Merged) -> Collection:
    """Memory-map the merged files in a local folder. Their hashes have been checked by the caller."""
    vectors = open_vectors(folder / VECTORS, merged.dim)
    files = [(folder / part.name, part.first, part.count) for part in merged.parts]
    index = Parts(files, merged.dim, mapped=all(part.mapped for part in merged.parts))
    if merged.rescore == "none" or not len(vectors):
        return Collection(index, vectors, None)
    if merged.rescore == "float16":
        return Collection(index, vectors, vectors, Readahead(folder / VECTORS, vectors.itemsize * merged.dim))
    rows = Int8Vectors(folder / INT8, merged.dim)
    return Collection(index, vectors, rows, Readahead(folder / INT8, rows.row_bytes))
