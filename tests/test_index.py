import numpy as np
import pytest

from pipeline import index
from pipeline.config import IndexConfig
from pipeline.errors import ConfigError, VerificationError


def unit_vectors(count, dim=64, seed=0):
    """Clustered unit vectors, as embeddings are: 50 centres and noise."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((50, dim))
    vectors = centres[rng.integers(0, 50, count)] + 0.7 * rng.standard_normal((count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def vectors():
    return unit_vectors(12_000)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "opq"])
def trained(request, vectors):
    plan = index.choose(IndexConfig(kind="ivfpq", nlist=64, m=16, opq=request.param), len(vectors), 64)
    return index.train(plan, vectors, seed=1)


@pytest.mark.parametrize("shards", [1, 2, 7])
def test_merged_index_answers_as_a_one_shot_index(vectors, trained, shards):
    one_shot = index.load_trained(trained)
    one_shot.add(vectors)
    parts = np.array_split(np.random.default_rng(3).permutation(len(vectors)), shards)
    codes = ((index.encode(index.load_trained(trained), vectors[part], "shard"), part) for part in parts)
    merged = index.merge(index.load_trained(trained), codes)
    assert merged.ntotal == len(vectors)
    queries = unit_vectors(500, seed=9)
    for nprobe in (1, 8, 64):
        scores, ids = index.search(one_shot, queries, 10, nprobe)
        merged_scores, merged_ids = index.search(merged, queries, 10, nprobe)
        assert (ids == merged_ids).mean() >= 0.999
        assert (scores == merged_scores).mean() >= 0.999


def test_merge_leaves_dead_rows_out(vectors, trained):
    ordinals = np.arange(len(vectors))
    ordinals[::3] = -1
    merged = index.merge(index.load_trained(trained), [(index.encode(index.load_trained(trained), vectors, "s"), ordinals)])
    assert merged.ntotal == (ordinals >= 0).sum()
    _, found = index.search(merged, vectors[:50], 20, 64)
    assert not set(found.ravel().tolist()) & set(range(0, len(vectors), 3))


def test_training_is_seeded(vectors):
    plan = index.choose(IndexConfig(kind="ivfpq", nlist=16, m=8), len(vectors), 64)
    assert index.train(plan, vectors, seed=5) == index.train(plan, vectors, seed=5)
    assert index.train(plan, vectors, seed=5) != index.train(plan, vectors, seed=6)


@pytest.mark.parametrize("kind", ["flat", "ivfpq"])
def test_written_index_opens_with_plain_faiss(tmp_path, vectors, trained, kind):
    import faiss

    made = index.flat(vectors.astype(np.float16))
    if kind == "ivfpq":
        made = index.merge(
            index.load_trained(trained), [(index.encode(index.load_trained(trained), vectors, "s"), np.arange(len(vectors)))]
        )
    index.write(made, tmp_path / "index.faiss")
    plain = faiss.read_index(str(tmp_path / "index.faiss"))
    opened = index.read(tmp_path / "index.faiss", dim=64, ntotal=len(vectors))
    assert plain.ntotal == opened.ntotal == len(vectors)
    assert (plain.search(vectors[:9], 3)[1] == index.search(opened, vectors[:9], 3, 1)[1]).all()
    with pytest.raises(VerificationError, match="the manifest says"):
        index.read(tmp_path / "index.faiss", dim=64, ntotal=5)
    (tmp_path / "index.faiss").write_bytes(b"garbage")
    with pytest.raises(VerificationError, match="not readable by FAISS"):
        index.read(tmp_path / "index.faiss", dim=64, ntotal=5)


@pytest.mark.parametrize(
    ("passages", "request_", "kind", "nlist", "why"),
    [
        (1, {}, "flat", 0, "under 9984"),
        (9_983, {}, "flat", 0, "under 9984"),
        (9_984, {}, "ivfpq", 256, "9984 passages"),
        (1_000_000, {}, "ivfpq", 4096, "1000000 passages"),
        (10, {"kind": "ivfpq"}, "flat", 0, "fewer than the 256 centroids"),
        (300, {"kind": "ivfpq"}, "ivfpq", 4, "nlist shrunk from 64 to 4"),
        (300, {"kind": "ivfpq", "nlist": 100}, "ivfpq", 7, "nlist shrunk from 100 to 7"),
        (50_000, {"kind": "ivfpq", "nlist": 100, "m": 96, "nbits": 4}, "ivfpq", 100, ""),
        (10**6, {"kind": "flat"}, "flat", 0, "index.kind is flat"),
    ],
)
def test_choose_fits_the_corpus_and_says_why(passages, request_, kind, nlist, why):
    plan = index.choose(IndexConfig(**request_), passages, 384)
    assert (plan.kind, plan.nlist) == (kind, nlist)
    assert why in plan.why
    assert plan.train_vectors <= max(passages, 256)


def test_choose_names_the_m_that_fit():
    with pytest.raises(ConfigError, match=r"dim 384 cannot be cut into 50 parts; choose one of \[32, 48, 64, 96\]"):
        index.choose(IndexConfig(m=50), 10, 384)


def test_non_finite_vectors_are_refused_by_name(vectors, trained):
    bad = vectors[:20].copy()
    bad[7, 3] = np.nan
    with pytest.raises(VerificationError, match=r"shard-x: row 7 is not finite"):
        index.encode(index.load_trained(trained), bad, "shard-x")
    with pytest.raises(VerificationError, match="32 dimensions, the trained index has 64"):
        index.encode(index.load_trained(trained), np.zeros((2, 32), np.float32), "shard-y")
