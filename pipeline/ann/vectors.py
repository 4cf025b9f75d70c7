"""The vectors of an artifact, memory-mapped: ``vectors.f16`` and, for re-scoring at half the page cache, ``vectors.int8``.

``vectors.f16`` is (n, dim) little-endian float16. A row of ``vectors.int8`` is a float32 scale and dim int8 values, the
largest of which is 127: the vector is their product. On 100,000 MiniLM and static vectors that keeps 0.997 and 0.992 of the
exact ten nearest; ranges per dimension, the usual calibration, kept 0.990 of the static ones.
"""

import contextlib
import mmap
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

VECTORS = "vectors.f16"
INT8 = "vectors.int8"
BLOCK_ROWS = 1 << 14
ASKING_RESIDENT_S = 4e-6
"""Asking for a page in memory takes a quarter of this, for one that is not three times as much (measured)."""
MAX_FAULT_SHARE = 0.05

SIGN_EXPONENT_MANTISSA = np.int32(-0x70002000)
EXPONENT_STEP = np.float32(2.0**112)

Vectors = npt.NDArray[np.float16]


class Int8Vectors:
    """``vectors.int8``: rows come out as float32."""

    def __init__(self, file: Path, dim: int) -> None:
        self._rows = np.memmap(file, dtype=_row(dim), mode="r") if file.stat().st_size else np.empty(0, _row(dim))
        self.row_bytes = _row(dim).itemsize

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: Any) -> npt.NDArray[np.float32]:
        found = self._rows[rows]
        return cast(npt.NDArray[np.float32], found["values"] * found["scale"][..., None])


def open_vectors(file: Path, dim: int) -> Vectors:
    """Memory-map ``vectors.f16`` as (n, dim)."""
    size = file.stat().st_size
    return np.asarray(np.memmap(file, dtype="<f2", mode="r")).reshape(-1, dim) if size else np.empty((0, dim), np.float16)


class Readahead:
    """Asks the disk for all the rows of a query at once where they are not in memory, so that they do not wait for each other.

    200 rows of 512 bytes, one page fault after the other: 400 ms; asked for together: 3 ms (measured). Asking for what is in
    memory costs 1 us a row, a quarter of a query; so it goes on only while asking takes long or reading causes faults.
    """

    def __init__(self, file: Path, row_bytes: int) -> None:  # the file is not empty
        self._row_bytes = row_bytes
        with file.open("rb") as opened:
            self._map = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        self.is_cold = True

    @contextlib.contextmanager
    def reading(self, rows: npt.NDArray[np.int64]) -> Iterator[None]:
        """Around the reading of rows; negative ones are none."""
        if self.is_cold:
            self._ask(rows[rows >= 0])
            yield
            return
        before = _major_faults()
        yield
        self.is_cold = _major_faults() - before > MAX_FAULT_SHARE * rows.size

    def _ask(self, rows: npt.NDArray[np.int64]) -> None:
        first = rows * self._row_bytes // mmap.PAGESIZE
        last = ((rows + 1) * self._row_bytes - 1) // mmap.PAGESIZE
        started = time.perf_counter()
        for page, pages in zip((first * mmap.PAGESIZE).tolist(), (last - first + 1).tolist(), strict=True):
            self._map.madvise(mmap.MADV_WILLNEED, page, pages * mmap.PAGESIZE)
        self.is_cold = time.perf_counter() - started > ASKING_RESIDENT_S * len(rows)


def _major_faults() -> int:
    """Pages that this thread has waited for the disk for."""
    return resource.getrusage(getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)).ru_majflt


def gather(vectors: Vectors | Int8Vectors, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Some rows of (n, dim) vectors as float32: (..., dim) for rows of any shape."""
    return vectors[rows] if isinstance(vectors, Int8Vectors) else to_float32(vectors.take(rows, axis=0))


def to_float32(halves: Vectors) -> npt.NDArray[np.float32]:
    """Finite float16 as float32, exactly, six times as fast as ``astype``: numpy 2.4 converts number by number.

    The bits move to their places in a float32, whose exponent is then 112 too small.
    """
    bits = halves.view(np.int16).astype(np.int32)
    bits <<= 13
    bits &= SIGN_EXPONENT_MANTISSA
    floats = bits.view(np.float32)
    floats *= EXPONENT_STEP
    return floats


def write_int8(vectors: Vectors, file: Path) -> None:
    """Write (n, dim) vectors in the form of ``vectors.int8``."""
    with file.open("wb") as out:
        for first in range(0, len(vectors), BLOCK_ROWS):
            block = to_float32(vectors[first : first + BLOCK_ROWS])
            rows = np.empty(len(block), dtype=_row(block.shape[1]))
            rows["scale"] = np.maximum(np.abs(block).max(axis=1), np.finfo(np.float32).tiny) / 127
            rows["values"] = np.rint(block / rows["scale"][:, None])
            out.write(rows.tobytes())


def _row(dim: int) -> np.dtype[Any]:
    return np.dtype([("scale", "<f4"), ("values", "i1", (dim,))])
