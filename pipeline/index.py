"""The only FAISS door: choose, train, add, merge, search.

An index shard is a matrix of FAISS standalone codes (list number + PQ code) in the row order of its embedding
shard, not an index file: merging is one ``add_sa_codes`` per shard with the rows that are live, bit-equal to
a one-shot ``add``, and a shard of one vector does not drag a copy of the centroids along.
Metric: inner product on unit vectors, higher is better.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import faiss
import numpy as np
import numpy.typing as npt

from pipeline.config import IndexConfig
from pipeline.errors import ConfigError, VerificationError

Matrix = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]
Ordinals = npt.NDArray[np.int64]

MIN_PER_CENTROID = 39
"""FAISS warns below so many training vectors per centroid (ClusteringParameters.min_points_per_centroid)."""
TRAIN_PER_LIST = 64
MIN_TRAIN_VECTORS = 1 << 16
FLAT_BELOW = MIN_PER_CENTROID << 8
"""Under 9,984 passages a PQ codebook of 256 centroids has too little to learn from, and exact search takes a millisecond."""
BLOCK_ROWS = 1 << 16


@dataclass(frozen=True)
class IndexPlan:
    """The chosen index and why. For ``flat`` the other numbers are 0."""

    kind: Literal["flat", "ivfpq"]
    why: str
    nlist: int = 0
    m: int = 0
    nbits: int = 0
    opq: bool = False
    train_vectors: int = 0


def choose(request: IndexConfig, passages: int, dim: int) -> IndexPlan:
    """Index for so many passages; what does not fit a small one shrinks, and ``why`` says so. Raises ConfigError on a bad m."""
    if request.m and dim % request.m:
        fitting = [m for m in divisors(dim) if request.m // 2 <= m <= 2 * request.m]
        raise ConfigError(f"index.m: dim {dim} cannot be cut into {request.m} parts; choose one of {fitting or divisors(dim)}")
    if request.kind == "flat":
        return IndexPlan("flat", "index.kind is flat")
    if request.kind == "auto" and passages < FLAT_BELOW:
        return IndexPlan(
            "flat", f"{passages} passages are under {FLAT_BELOW}: exact search is fast and PQ has too little to learn from"
        )
    least = 1 << request.nbits
    if passages < least:
        return IndexPlan(
            "flat", f"{passages} passages are fewer than the {least} centroids of a PQ codebook of {request.nbits} bits"
        )
    wanted = request.nlist or 1 << int(np.log2(4 * np.sqrt(passages)) + 0.5)
    nlist = min(wanted, max(1, passages // MIN_PER_CENTROID))
    if not request.nlist:
        nlist = 1 << int(np.log2(nlist))
    notes = [f"{passages} passages of {dim} dimensions"]
    if nlist < wanted:
        notes.append(f"nlist shrunk from {wanted} to {nlist} to keep {MIN_PER_CENTROID} passages per list")
    train_vectors = min(passages, request.train_vectors or max(TRAIN_PER_LIST * nlist, MIN_TRAIN_VECTORS))
    m = request.m or _default_m(dim)
    return IndexPlan("ivfpq", ", ".join(notes), nlist, m, request.nbits, request.opq, max(train_vectors, least, nlist))


def divisors(dim: int) -> list[int]:
    """Every m that ``dim`` can be cut into."""
    return [m for m in range(1, dim + 1) if dim % m == 0]


def train(plan: IndexPlan, vectors: Matrix, seed: int) -> bytes:
    """Train centroids and codebooks on (n, dim) float32; returns the empty index as FAISS bytes."""
    dim = vectors.shape[1]
    rotation = f"OPQ{plan.m}," if plan.opq else ""
    # np: no polysemous training, which costs 1.7 CPU seconds per sub-vector (84 s at m = 48) and which no search here uses
    factory = f"{rotation}IVF{plan.nlist},PQ{plan.m}x{plan.nbits}np"
    index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    ivf = faiss.extract_index_ivf(index)
    ivf.cp.seed = seed
    faiss.downcast_index(ivf).pq.cp.seed = seed
    index.train(_finite(vectors, "the training sample"))
    return cast(bytes, faiss.serialize_index(index).tobytes())


def load_trained(data: bytes) -> Any:
    """FAISS bytes -> an empty trained index. The caller has checked their hash."""
    return faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))


def encode(trained: Any, vectors: Matrix, where: str) -> Codes:
    """Standalone codes (n, code size) of (n, dim) vectors; raises VerificationError naming ``where`` on a non-finite one."""
    if vectors.shape[1] != trained.d:
        raise VerificationError(f"{where}: {vectors.shape[1]} dimensions, the trained index has {trained.d}; retrain")
    return cast(Codes, trained.sa_encode(_finite(vectors, where)))


def merge(trained: Any, shards: Iterable[tuple[Codes, Ordinals]]) -> Any:
    """Move codes into ``trained`` under their ordinals; (n, code size) uint8 with (n,) int64, rows of -1 are left out."""
    ivf = faiss.extract_index_ivf(trained)
    for codes, ordinals in shards:
        live = ordinals >= 0
        if live.any():
            ivf.add_sa_codes(np.ascontiguousarray(codes[live]), ordinals[live])
    trained.ntotal = ivf.ntotal
    return trained


def flat(vectors: npt.NDArray[np.float16]) -> Any:
    """An exact index over (n, dim) float16 vectors; its ids are their rows."""
    index = faiss.IndexFlatIP(vectors.shape[1])
    for first in range(0, len(vectors), BLOCK_ROWS):
        index.add(_finite(vectors[first : first + BLOCK_ROWS].astype(np.float32), "vectors.f16"))
    return index


def write(index: Any, file: Path) -> None:
    """Write an index that plain ``faiss.read_index`` opens."""
    faiss.write_index(index, str(file))


def read(file: Path, *, dim: int, ntotal: int) -> Any:
    """Memory-map an index whose hash the caller has checked; raises VerificationError unless its numbers are the manifest's."""
    try:
        index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise VerificationError(
            f"{file}: not readable by FAISS, {str(error).splitlines()[0]}; restore or rebuild the artifact"
        ) from error
    if index.d != dim or index.ntotal != ntotal or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise VerificationError(
            f"{file}: d {index.d}, ntotal {index.ntotal}, the manifest says {dim}, {ntotal}; rebuild the artifact"
        )
    return index


def search(index: Any, queries: Matrix, k: int, nprobe: int) -> tuple[Matrix, Ordinals]:
    """Scores and ordinals, (q, k) each, best first; ordinal -1 pads. ``nprobe`` means nothing to a flat index."""
    if nprobe and (ivf := faiss.try_extract_index_ivf(index)) is not None:
        parameters: Any = faiss.SearchParametersIVF(nprobe=min(nprobe, ivf.nlist))
        if isinstance(index, faiss.IndexPreTransform):
            parameters = faiss.SearchParametersPreTransform(index_params=parameters)
        return cast(tuple[Matrix, Ordinals], index.search(np.ascontiguousarray(queries), k, params=parameters))
    return cast(tuple[Matrix, Ordinals], index.search(np.ascontiguousarray(queries), k))


def lists(index: Any) -> int:
    """Inverted lists of an index; 0 for a flat one."""
    ivf = faiss.try_extract_index_ivf(index)
    return 0 if ivf is None else int(ivf.nlist)


def set_threads(threads: int) -> None:
    """OpenMP threads of this process's FAISS calls."""
    faiss.omp_set_num_threads(threads)


def _default_m(dim: int) -> int:
    return max(m for m in divisors(dim) if m <= max(1, dim // 8))


def _finite(vectors: Matrix, where: str) -> Matrix:
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise VerificationError(f"{where}: row {row} is not finite (FAISS would drop it silently); encode it again")
    return np.ascontiguousarray(vectors, dtype=np.float32)
