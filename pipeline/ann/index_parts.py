"""An artifact's index files, opened with FAISS: searched as one index, and read entry by entry."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import faiss
import numpy as np
import numpy.typing as npt

from pipeline.ann.clustering import Matrix
from pipeline.ann.index import Codes, Ordinals, rotate
from pipeline.errors import VerificationError

MIN_VECTOR_LIMIT = 1 << 32
"""FAISS holds tables that it would compute to the limit for what it reads, so the limit is not just the file's size."""
MAX_FILE_LOOPS = 1 << 28
"""Elements of a list of objects inside an index file; a damaged count above it is refused."""


class Parts:
    """The index files of an artifact searched as one index, memory-mapped or, where FAISS cannot map them, read whole.

    ``files``: (path, first ordinal, number of vectors) in order. The hash of each has been checked by the caller; raises
    VerificationError unless FAISS reads what the manifest says.
    """

    def __init__(self, files: Sequence[tuple[Path, int, int]], dim: int, *, mapped: bool = True) -> None:
        self._parts = [(_read(file, dim, count, mapped=mapped), first) for file, first, count in files]
        self._ivfs = [faiss.try_extract_index_ivf(part) for part, _ in self._parts]
        self.lists = int(self._ivfs[0].nlist) if self._ivfs and self._ivfs[0] is not None else 0
        """Inverted lists; 0 for an index without."""

    @property
    def ordinals(self) -> range:
        """Those of all files, which follow each other."""
        if not self._parts:
            return range(0)
        last, first = self._parts[-1]
        return range(self._parts[0][1], first + last.ntotal)

    @property
    def can_select(self) -> bool:
        """Whether a search can be held to some ordinals: FAISS has that for inverted lists and flat indexes, not for all."""
        flat = (isinstance(part, faiss.IndexFlat) for part, _ in self._parts)
        return bool(self.lists) or all(flat)

    def search(
        self, queries: Matrix, k: int, nprobe: int, allowed: npt.NDArray[np.bool_] | None = None
    ) -> tuple[Matrix, Ordinals]:
        """Scores and ordinals, (q, k) each, best first; ordinal -1 pads. ``nprobe`` means nothing without lists.

        ``allowed``: (n,) by ordinal, what may be found; only where ``can_select``.
        """
        queries = np.ascontiguousarray(queries)
        if not self._parts:
            return np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
        probes = min(nprobe or self.lists, self.lists)
        chosen = {} if allowed is None else {"sel": _selector(allowed)}
        if len(self._parts) == 1 and self.lists:
            found = self._search_one(queries, k, faiss.SearchParametersIVF(nprobe=probes, **chosen))
        elif self.lists:
            found = self._search_lists(queries, k, faiss.SearchParametersIVF(nprobe=probes, **chosen))
        else:
            found = _best([_shifted(_search_plain(*part, queries, k, allowed), part[1]) for part in self._parts], k)
        return found

    def list_sizes(self) -> list[int]:
        """Vectors in each inverted list, over all files; empty for an index without."""
        lists = [ivf.invlists for ivf in self._ivfs] if self.lists else []
        return [sum(part.list_size(number) for part in lists) for number in range(self.lists)]

    def contents(self, sample: Ordinals) -> tuple[npt.NDArray[np.int64], Codes]:
        """How often each ordinal is in the index, (n,), and the standalone codes of a sorted sample of them, (s, code size).

        The sample must be empty where an index has no inverted lists.
        """
        if not self._parts:
            return np.empty(0, dtype=np.int64), np.empty((0, 0), dtype=np.uint8)
        ids = np.concatenate([_ids(ivf, *part) for part, ivf in zip(self._parts, self._ivfs, strict=True)])
        times = np.bincount(ids[ids >= 0])
        if not len(sample):
            return times, np.empty((0, 0), dtype=np.uint8)
        codes = np.zeros((len(sample), self._ivfs[0].sa_code_size()), dtype=np.uint8)
        for ivf in self._ivfs:
            _read_codes(faiss.downcast_index(ivf), sample, codes)
        return times, codes

    def _search_one(self, queries: Matrix, k: int, parameters: Any) -> tuple[Matrix, Ordinals]:
        index, _ = self._parts[0]
        if isinstance(index, faiss.IndexPreTransform):
            parameters = faiss.SearchParametersPreTransform(index_params=parameters)
        return cast(tuple[Matrix, Ordinals], index.search(queries, k, params=parameters))

    def _search_lists(self, queries: Matrix, k: int, parameters: Any) -> tuple[Matrix, Ordinals]:
        """The near lists are the same in every part, so they are found once."""
        rotated = rotate(self._parts[0][0], queries)
        scores, lists = self._ivfs[0].quantizer.search(rotated, parameters.nprobe)
        found = []
        for ivf in self._ivfs:
            part = (np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64))
            pointers = [faiss.swig_ptr(array) for array in (rotated, lists, scores, *part)]
            faiss.downcast_index(ivf).search_preassigned_c(  # the wrapper without _c takes no parameters
                len(queries), pointers[0], k, *pointers[1:], False, parameters
            )
            found.append(part)
        return _best(found, k)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Search on the calling thread alone, as a service does."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _read(file: Path, dim: int, ntotal: int, *, mapped: bool) -> Any:
    faiss.set_deserialization_loop_limit(MAX_FILE_LOOPS)
    faiss.set_deserialization_vector_byte_limit(max(MIN_VECTOR_LIMIT, file.stat().st_size))
    try:
        index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
    except RuntimeError as error:
        raise VerificationError(
            f"{file}: not readable by FAISS, {str(error).splitlines()[0]}; restore or rebuild the artifact"
        ) from error
    if index.d != dim or index.ntotal != ntotal or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise VerificationError(
            f"{file}: d {index.d}, ntotal {index.ntotal}, the manifest says {dim}, {ntotal}; rebuild the artifact"
        )
    return index


def _ids(ivf: Any, index: Any, first: int) -> Ordinals:
    """The ordinals of all entries of a part, list by list."""
    if ivf is None:
        return np.arange(first, first + index.ntotal)
    return np.concatenate([_list_ids(ivf, number) for number in range(ivf.nlist)])


def _list_ids(ivf: Any, number: int) -> Ordinals:
    size = ivf.invlists.list_size(number)
    if not size:
        return np.empty(0, dtype=np.int64)
    pointer = ivf.invlists.get_ids(number)
    ids = faiss.rev_swig_ptr(pointer, size).copy()
    ivf.invlists.release_ids(number, pointer)
    return cast(Ordinals, ids)


def _read_codes(ivf: Any, sample: Ordinals, codes: Codes) -> None:
    """Fill in the standalone codes of those ids of a sorted sample that this part has: its list's number and its code."""
    lists = faiss.downcast_InvertedLists(ivf.invlists)
    in_blocks = isinstance(lists, faiss.BlockInvertedLists)
    size = lists.packer.code_size if in_blocks else lists.code_size
    wide = codes.shape[1] - size
    code = np.empty(size, dtype=np.uint8)
    for number in range(ivf.nlist):
        ids = _list_ids(ivf, number)
        rows = np.minimum(np.searchsorted(sample, ids), len(sample) - 1)
        found = np.flatnonzero(sample[rows] == ids)
        pointer = lists.get_codes(number)
        for offset in found:
            if in_blocks:
                lists.packer.unpack_1_c(pointer, int(offset), faiss.swig_ptr(code))
            else:
                code[:] = faiss.rev_swig_ptr(pointer, len(ids) * size)[offset * size : (offset + 1) * size]
            row = codes[rows[offset]]
            row[:wide], row[wide:] = np.frombuffer(number.to_bytes(wide, "little"), dtype=np.uint8), code
        lists.release_codes(number, pointer)


def _search_plain(
    index: Any, first: int, queries: Matrix, k: int, allowed: npt.NDArray[np.bool_] | None
) -> tuple[Matrix, Ordinals]:
    """An index without lists, whose ids are rows; ``allowed`` is by ordinal, so of all parts."""
    chosen = None if allowed is None else allowed[first : first + index.ntotal]
    parameters = None if chosen is None else faiss.SearchParameters(sel=_selector(chosen))
    return cast(tuple[Matrix, Ordinals], index.search(queries, k, params=parameters))


def _selector(allowed: npt.NDArray[np.bool_]) -> Any:
    """FAISS's selector of ids; it keeps the bits that it points to."""
    return faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))


def _shifted(found: tuple[Matrix, Ordinals], first: int) -> tuple[Matrix, Ordinals]:
    return found[0], np.where(found[1] >= 0, found[1] + first, -1)


def _best(found: Sequence[tuple[Matrix, Ordinals]], k: int) -> tuple[Matrix, Ordinals]:
    """The k best of several answers, -1 padded."""
    scores = np.concatenate([part for part, _ in found], axis=1)
    ids = np.concatenate([part for _, part in found], axis=1)
    order = np.argsort(-np.where(ids < 0, -np.inf, scores), axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
