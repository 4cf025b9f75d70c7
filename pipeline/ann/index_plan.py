"""Which index fits a corpus: kind, lists and bytes, from the number of passages and the dimension. No FAISS here."""

from dataclasses import dataclass

import numpy as np

from pipeline.config_what import IndexConfig, Kind
from pipeline.errors import ConfigError

PACKED: frozenset[Kind] = frozenset({"ivfpqfs", "ivfrabitq"})
"""Kinds whose codes are packed in blocks for SIMD once all are there."""
MIN_PER_CENTROID = 39
"""FAISS warns below so many training vectors per centroid (ClusteringParameters.min_points_per_centroid)."""
TRAIN_PER_LIST = 64
MIN_TRAIN_VECTORS = 1 << 16
FLAT_BELOW = MIN_PER_CENTROID << 8
"""Under 9,984 passages exact search takes a millisecond."""
MAX_BYTES_PER_VECTOR = 80
MERGE_COPIES = 4
"""Bytes of memory per byte of code and id while a part is merged: FAISS's lists grow by doubling, packing copies them."""
ID_BYTES = 8
"""FAISS keeps an int64 id beside each code."""
FAST_SCAN_BITS = 4
FAST_WIDTHS = (1, 2, 4, 8, 12)
"""Dimensions per sub-vector for which FAISS has SIMD; codes of 3 took five times as long as those of 4."""
RABITQ_FACTOR_BYTES = 8
FAST_SCAN_BLOCK = 32
"""Fast scan keeps codes in blocks of so many; the last one of each list is half empty on average."""


@dataclass(frozen=True)
class IndexPlan:
    """The chosen index and why. What a kind does not have is 0 or empty."""

    kind: Kind
    why: str
    nlist: int = 0
    m: int = 0
    nbits: int = 0
    opq: bool = False
    train_vectors: int = 0
    factory: str = ""


def choose(request: IndexConfig, passages: int, dim: int) -> IndexPlan:
    """Index for so many passages; what does not fit a small one shrinks, and ``why`` says so.

    Raises ConfigError on an m that does not divide ``dim`` and on a kind that needs more than ``max_bytes_per_vector``.
    """
    if request.m and dim % request.m:
        fitting = [m for m in divisors(dim) if request.m // 2 <= m <= 2 * request.m]
        raise ConfigError(f"index.m: dim {dim} cannot be cut into {request.m} parts; choose one of {fitting or divisors(dim)}")
    if request.factory:
        count = min(passages, request.train_vectors or MIN_TRAIN_VECTORS)
        return IndexPlan("factory", "index.factory is given", factory=request.factory, train_vectors=count)
    kind: Kind = "ivfpqfs" if request.kind == "auto" else request.kind
    m, nbits = _code_shape(request, kind, dim)
    _check_bytes(request, kind, code_bytes(kind, dim, m, nbits), passages)
    if kind == "flat":
        return IndexPlan("flat", "index.kind is flat")
    if request.kind == "auto" and passages < FLAT_BELOW:
        return IndexPlan("flat", f"{passages} passages are under {FLAT_BELOW}: exact search is fast")
    least = 1 << nbits if nbits else 1
    if passages < least:
        why = f"{passages} passages are fewer than the {least} centroids of a PQ codebook of {nbits} bits"
        return IndexPlan("flat", why)
    wanted = request.nlist or 1 << int(np.log2(4 * np.sqrt(passages)) + 0.5)
    nlist = min(wanted, max(1, passages // MIN_PER_CENTROID))
    if not request.nlist:
        nlist = 1 << int(np.log2(nlist))
    notes = [f"{passages} passages of {dim} dimensions"]
    if nlist < wanted:
        notes.append(f"nlist shrunk from {wanted} to {nlist} to keep {MIN_PER_CENTROID} passages per list")
    sample = min(passages, request.train_vectors or max(TRAIN_PER_LIST * nlist, MIN_TRAIN_VECTORS))
    return IndexPlan(kind, ", ".join(notes), nlist, m, nbits, request.opq, max(sample, least, nlist))


def is_coded(kind: Kind) -> bool:
    """Whether vectors become codes shard by shard; the others are built from vectors at the merge."""
    return kind not in {"flat", "factory"}


def code_bytes(kind: Kind, dim: int, m: int, nbits: int) -> int:
    """Bytes of one vector's code, without its id; a factory index is taken for a flat one."""
    if kind == "ivfrabitq":
        return -(-dim // 8) + RABITQ_FACTOR_BYTES
    return {"flat": 4 * dim, "factory": 4 * dim, "ivfsq8": dim}.get(kind, -(-m * nbits // 8))


def standalone_bytes(kind: Kind, dim: int, m: int, nbits: int, nlist: int) -> int:
    """Bytes of a FAISS standalone code: as few bytes as the list's number needs, and the code."""
    return ((nlist - 1).bit_length() + 7) // 8 + code_bytes(kind, dim, m, nbits)


def index_bytes(plan: IndexPlan, passages: int, dim: int) -> int:
    """Estimated bytes of the index in memory: codes, ids, centroids and codebooks. A factory index counts as flat."""
    if not is_coded(plan.kind):
        return 4 * dim * passages
    entry = code_bytes(plan.kind, dim, plan.m, plan.nbits) + ID_BYTES
    blocks = plan.nlist * FAST_SCAN_BLOCK // 2 if plan.kind in PACKED else 0
    return (passages + blocks) * entry + 4 * dim * (plan.nlist + (1 << plan.nbits))


def divisors(dim: int) -> list[int]:
    """Every m that ``dim`` can be cut into."""
    return [m for m in range(1, dim + 1) if dim % m == 0]


def _code_shape(request: IndexConfig, kind: Kind, dim: int) -> tuple[int, int]:
    """Sub-vectors and their bits, (0, 0) for kinds without a product quantizer."""
    if kind not in {"ivfpq", "ivfpqfs"}:
        return 0, 0
    if kind == "ivfpqfs" and request.nbits not in {None, FAST_SCAN_BITS}:
        raise ConfigError(f"index.nbits: fast scan has {FAST_SCAN_BITS} bits, not {request.nbits}; set index.kind=ivfpq")
    nbits = request.nbits or (FAST_SCAN_BITS if kind == "ivfpqfs" else 8)
    if request.m:
        return request.m, nbits
    room = (request.max_bytes_per_vector or MAX_BYTES_PER_VECTOR) - ID_BYTES
    most = min(8 * room // nbits, dim // 2 if nbits <= FAST_SCAN_BITS else dim // 8)
    fitting = [m for m in divisors(dim) if m <= max(1, most)]
    return max([m for m in fitting if dim // m in FAST_WIDTHS] or fitting), nbits


def _check_bytes(request: IndexConfig, kind: Kind, code: int, passages: int) -> None:
    limit = request.max_bytes_per_vector
    explicit = request.kind != "auto" or passages >= FLAT_BELOW
    if limit and explicit and code + ID_BYTES > limit:
        raise ConfigError(
            f"index.max_bytes_per_vector: {kind} needs {code} bytes for the code and {ID_BYTES} for the id, the limit is "
            f"{limit}; raise it, or set index.kind=ivfpqfs, whose m follows the limit"
        )
