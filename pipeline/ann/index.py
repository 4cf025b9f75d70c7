"""Making an index with FAISS: train, encode, merge, write.

An index shard is a matrix of FAISS standalone codes (list number + code) in the row order of its embedding shard, not an
index file: merging is one ``add_sa_codes`` per shard with the rows that are live, bit-equal to a one-shot ``add``, and
a shard of one vector does not drag a copy of the centroids along. Fast-scan kinds are merged in their plain form, which
keeps explicit ids, and packed at the end. Metric: inner product on unit vectors, higher is better.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import faiss
import numpy as np
import numpy.typing as npt

from pipeline.ann.clustering import Assigner, Matrix, train_centroids
from pipeline.ann.index_plan import PACKED, IndexPlan
from pipeline.config_what import Kind
from pipeline.errors import ConfigError, VerificationError

Codes = npt.NDArray[np.uint8]
Ordinals = npt.NDArray[np.int64]

CODEBOOK_SAMPLE = 1 << 15
"""Residuals that codebooks are trained on: 128 per centroid at 8 bits."""
BLOCK_ROWS = 1 << 16


def train(plan: IndexPlan, vectors: Matrix, seed: int) -> bytes:
    """Train centroids and codebooks on (n, dim) float32 in random order; returns the empty index as FAISS bytes.

    Raises ConfigError on a factory string that FAISS does not know, or cannot train with these vectors.
    """
    vectors = _finite(vectors, "the training sample")
    if plan.kind == "factory":
        with _refused(f"{plan.factory} over {len(vectors)} vectors of {vectors.shape[1]} dimensions"):
            index = faiss.index_factory(vectors.shape[1], plan.factory, faiss.METRIC_INNER_PRODUCT)
            index.train(vectors)
        return cast(bytes, faiss.serialize_index(index).tobytes())
    rotation = _rotation(plan, vectors, seed)
    rotated = rotation.apply(vectors) if rotation else vectors
    centroids = train_centroids(rotated, plan.nlist, seed)
    ivf = _empty(plan, centroids)
    few = rotated[:CODEBOOK_SAMPLE]
    lists = Assigner(centroids)(few)
    learnt = np.ascontiguousarray(few - centroids[lists] if ivf.by_residual else few)
    if plan.m:
        ivf.pq.cp.seed = seed
        ivf.pq.cp.min_points_per_centroid = 1
    ivf.train_encoder(len(few), faiss.swig_ptr(learnt), faiss.swig_ptr(lists))
    ivf.is_trained = True
    index = faiss.IndexPreTransform(rotation, ivf) if rotation else ivf
    return cast(bytes, faiss.serialize_index(index).tobytes())


class Trained:
    """An empty trained index that turns vectors into codes. Its bytes' hash has been checked by the caller."""

    def __init__(self, data: bytes) -> None:
        self._index = load_trained(data)
        self.dim: int = self._index.d
        self._ivf = faiss.downcast_index(faiss.extract_index_ivf(self._index))
        centroids = self._ivf.quantizer.reconstruct_n(0, self._ivf.nlist)
        self._assign = Assigner(centroids)

    def encode(self, vectors: Matrix, where: str) -> Codes:
        """Standalone codes (n, code size) of (n, dim); raises VerificationError naming ``where`` on a non-finite vector."""
        if vectors.shape[1] != self.dim:
            raise VerificationError(f"{where}: {vectors.shape[1]} dimensions, the trained index has {self.dim}; retrain")
        rotated = rotate(self._index, _finite(vectors, where))
        lists = self._assign(rotated)
        codes = np.empty((len(vectors), self._ivf.sa_code_size()), dtype=np.uint8)
        pointers = (faiss.swig_ptr(array) for array in (rotated, lists, codes))
        self._ivf.encode_vectors(len(vectors), *pointers, True)
        return codes

    def error(self, vectors: Matrix) -> float:
        """Mean squared distance of (n, dim) vectors to what their codes decode to."""
        rotated = rotate(self._index, vectors)
        decoded = self._ivf.sa_decode(self.encode(vectors, "the sample"))
        return float(np.square(rotated - decoded).sum(axis=1).mean())

    def agreement(self, vectors: Matrix) -> float:
        """Share of vectors whose list is that of their nearest centroid."""
        return self._assign.agreement(rotate(self._index, vectors))


def load_trained(data: bytes) -> Any:
    """FAISS bytes -> an empty trained index. The caller has checked their hash."""
    return faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))


def merge(data: bytes, kind: Kind, shards: Iterable[tuple[Codes, Ordinals]]) -> Any:
    """Move codes into a copy of the trained index, in the form that is searched.

    ``shards``: (n, code size) uint8 with (n,) int64 ordinals; rows of -1 are left out.
    """
    trained = load_trained(data)
    ivf = faiss.extract_index_ivf(trained)
    for codes, ordinals in shards:
        live = ordinals >= 0
        if live.any():
            ivf.add_sa_codes(np.ascontiguousarray(codes[live]), ordinals[live])
    trained.ntotal = ivf.ntotal
    return _packed(trained, kind)


def build(data: bytes | None, vectors: npt.NDArray[np.float16], part: range) -> Any:
    """An index over the rows ``part`` of (n, dim) float16 vectors in one piece: flat, or that of a factory.

    Its ids are ordinals where FAISS can keep them, in inverted lists, else rows of the part. Raises ConfigError where the index
    cannot be added to.
    """
    index = faiss.IndexFlatIP(vectors.shape[1]) if data is None else load_trained(data)
    keeps_ids = faiss.try_extract_index_ivf(index) is not None
    for first in range(part.start, part.stop, BLOCK_ROWS):
        block = _finite(vectors[first : min(first + BLOCK_ROWS, part.stop)].astype(np.float32), "vectors.f16")
        with _refused(f"adding {len(block)} vectors"):
            if keeps_ids:
                index.add_with_ids(block, np.arange(first, first + len(block)))
            else:
                index.add(block)
    return index


def can_be_mapped(index: Any) -> bool:
    """Whether FAISS maps the file of an index; it would copy the blocks of fast scan and keep the mapping besides."""
    ivf = faiss.try_extract_index_ivf(index)
    return ivf is None or not isinstance(faiss.downcast_InvertedLists(ivf.invlists), faiss.BlockInvertedLists)


def write(index: Any, file: Path) -> None:
    """Write an index that plain ``faiss.read_index`` opens. Raises OSError; FAISS leaves what it has written behind."""
    try:
        faiss.write_index(index, str(file))
    except RuntimeError as error:
        raise OSError(str(error).splitlines()[-1]) from error


def set_threads(threads: int) -> None:
    """OpenMP threads of this process's FAISS calls."""
    faiss.omp_set_num_threads(threads)


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    """A block in which FAISS may refuse an index of the config's own."""
    try:
        yield
    except RuntimeError as error:
        raise ConfigError(f"index.factory: {what}, FAISS says {str(error).splitlines()[-1]}") from error


def _rotation(plan: IndexPlan, vectors: Matrix, seed: int) -> Any:
    """OPQ where it is asked for; for RaBitQ a random rotation, which its estimate needs; else None."""
    dim = vectors.shape[1]
    if plan.kind == "ivfrabitq":
        rotation = faiss.RandomRotationMatrix(dim, dim)
        rotation.init(seed)
        return rotation
    if plan.opq and plan.m:
        rotation = faiss.OPQMatrix(dim, plan.m)
        rotation.train(vectors[:CODEBOOK_SAMPLE])
        return rotation
    return None


def rotate(index: Any, vectors: Matrix) -> Matrix:
    """Vectors as the inverted file of an index sees them: through the transform before it, if there is one."""
    return cast(Matrix, index.chain.at(0).apply(vectors)) if isinstance(index, faiss.IndexPreTransform) else vectors


def _empty(plan: IndexPlan, centroids: Matrix) -> Any:
    """The inverted file in its plain form, over these centroids."""
    dim = centroids.shape[1]
    quantizer = faiss.IndexFlatIP(dim)
    quantizer.add(centroids)
    shape = (quantizer, dim, plan.nlist)
    if plan.kind == "ivfrabitq":
        return faiss.IndexIVFRaBitQ(*shape, faiss.METRIC_INNER_PRODUCT)
    if plan.kind == "ivfsq8":
        return faiss.IndexIVFScalarQuantizer(*shape, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
    return faiss.IndexIVFPQ(*shape, plan.m, plan.nbits, faiss.METRIC_INNER_PRODUCT)


def _packed(index: Any, kind: Kind) -> Any:
    """The form that is searched: codes of fast-scan kinds in blocks for SIMD. Takes over what ``index`` owns."""
    if kind not in PACKED:
        return index
    plain = faiss.downcast_index(faiss.extract_index_ivf(index))
    packed = faiss.IndexIVFPQFastScan(plain) if kind == "ivfpqfs" else faiss.IndexIVFRaBitQFastScan(plain)
    plain.own_fields, packed.own_fields = False, True  # FAISS shares the quantizer and would free it with the plain form
    if not isinstance(index, faiss.IndexPreTransform):
        return packed
    index.index = packed
    packed.this.disown()
    plain.this.own(True)
    return index


def _finite(vectors: Matrix, where: str) -> Matrix:
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise VerificationError(f"{where}: row {row} is not finite (FAISS would drop it silently); encode it again")
    return np.ascontiguousarray(vectors, dtype=np.float32)
