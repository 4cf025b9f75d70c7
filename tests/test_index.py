import numpy as np
import pytest

from pipeline.ann import index, index_parts
from pipeline.ann.index_plan import choose, code_bytes, index_bytes
from pipeline.config_what import IndexConfig
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


KINDS = {
    "ivfpq": IndexConfig(kind="ivfpq", nlist=64, m=16),
    "opq": IndexConfig(kind="ivfpq", nlist=64, m=16, opq=True),
    "ivfpqfs": IndexConfig(kind="ivfpqfs", nlist=64),
    "ivfrabitq": IndexConfig(kind="ivfrabitq", nlist=64),
    "ivfsq8": IndexConfig(kind="ivfsq8", nlist=64),
}


@pytest.fixture(scope="module", params=KINDS)
def trained(request, vectors):
    plan = choose(KINDS[request.param], len(vectors), 64)
    few = vectors[:3000] if request.param == "opq" else vectors  # minutes of all
    return plan.kind, index.train(plan, few, seed=1)


def opened(tmp_path, made, count, *, name="index.faiss"):
    index.write(made, tmp_path / name)
    return index_parts.Parts([(tmp_path / name, 0, count)], 64, mapped=index.can_be_mapped(made))


def same_answers(found, expected):
    """Equal scores, and equal ids but for neighbours of equal score, which fast scan's 8-bit tables make many."""
    (scores, ids), (expected_scores, expected_ids) = found, expected
    assert np.isclose(scores, expected_scores, rtol=0, atol=1e-6).mean() >= 0.999
    tied = np.isclose(np.diff(scores, axis=1, prepend=np.inf), 0, atol=1e-6)
    tied |= np.isclose(np.diff(scores, axis=1, append=-np.inf), 0, atol=1e-6) | (scores == scores[:, -1:])
    assert ((ids == expected_ids) | tied).mean() >= 0.999


@pytest.mark.parametrize("shards", [1, 7])
def test_merged_index_answers_as_a_one_shot_index(tmp_path, vectors, trained, shards):
    kind, data = trained
    one_shot = index.load_trained(data)
    one_shot.add(vectors)
    one_shot = opened(tmp_path, index._packed(one_shot, kind), len(vectors), name="one")
    parts = np.array_split(np.random.default_rng(3).permutation(len(vectors)), shards)
    encoder = index.Trained(data)
    merged = index.merge(data, kind, ((encoder.encode(vectors[part], "shard"), part) for part in parts))
    assert merged.ntotal == len(vectors)
    merged = opened(tmp_path, merged, len(vectors))
    queries = unit_vectors(300, seed=9)
    for nprobe in (1, 8, 64):
        same_answers(merged.search(queries, 10, nprobe), one_shot.search(queries, 10, nprobe))


def test_parts_answer_as_one(tmp_path, vectors, trained):
    kind, data = trained
    codes = index.Trained(data).encode(vectors, "shard")
    whole = opened(tmp_path, index.merge(data, kind, [(codes, np.arange(len(vectors)))]), len(vectors))
    files = []
    for first, end in ((0, 1), (1, 5000), (5000, 12_000)):
        made = index.merge(data, kind, [(codes[first:end], np.arange(first, end))])
        index.write(made, tmp_path / f"{first}.faiss")
        files.append((tmp_path / f"{first}.faiss", first, end - first))
    parts = index_parts.Parts(files, 64)
    queries = unit_vectors(300, seed=9)
    for nprobe in (1, 8, 64):
        same_answers(parts.search(queries, 10, nprobe), whole.search(queries, 10, nprobe))
    assert parts.lists == whole.lists == 64
    allowed = np.arange(len(vectors)) % 10 == 0
    for nprobe in (8, 64):
        same_answers(parts.search(queries, 10, nprobe, allowed), whole.search(queries, 10, nprobe, allowed))


def test_a_search_among_some_finds_the_best_of_those(tmp_path, vectors, trained):
    kind, data = trained
    codes = index.Trained(data).encode(vectors, "shard")
    whole = opened(tmp_path, index.merge(data, kind, [(codes, np.arange(len(vectors)))]), len(vectors))
    allowed = np.random.default_rng(5).random(len(vectors)) < 0.1
    queries = unit_vectors(50, seed=9)
    assert whole.can_select
    scores, ids = whole.search(queries, 10, 64, allowed)
    assert allowed[ids].all()
    every_score, every = whole.search(queries, 4000, 64)
    for row in range(len(queries)):
        places = np.flatnonzero(allowed[every[row]])[:10]
        assert scores[row] == pytest.approx(every_score[row][places], abs=2e-2 if kind in {"ivfpqfs", "ivfrabitq"} else 1e-5)


def test_flat_parts_answer_as_one(tmp_path, vectors):
    halves = vectors.astype(np.float16)
    files = []
    for first, end in ((0, 1), (1, 300), (300, 500)):
        index.write(index.build(None, halves, range(first, end)), tmp_path / f"{first}.faiss")
        files.append((tmp_path / f"{first}.faiss", first, end - first))
    whole = opened(tmp_path, index.build(None, halves, range(500)), 500)
    allowed = np.arange(500) % 7 == 0
    found = index_parts.Parts(files, 64).search(unit_vectors(20, seed=9), 10, 0, allowed)
    assert allowed[found[1]].all()
    same_answers(found, whole.search(unit_vectors(20, seed=9), 10, 0, allowed))
    for k in (10, 600):  # more than there are
        scores, ids = index_parts.Parts(files, 64).search(vectors[:20], k, 0)
        expected_scores, expected = whole.search(vectors[:20], k, 0)
        assert (ids == expected).all()
        assert np.allclose(scores[ids >= 0], expected_scores[expected >= 0], atol=1e-6)


def test_a_factory_string_builds_what_faiss_knows(tmp_path, vectors):
    plan = choose(IndexConfig(factory="HNSW8"), len(vectors), 64)
    assert (plan.kind, plan.factory) == ("factory", "HNSW8")
    made = index.build(index.train(plan, vectors, seed=1), vectors.astype(np.float16), range(2000))
    _, found = opened(tmp_path, made, 2000).search(vectors[:50], 5, 0)
    assert (found[:, 0] == np.arange(50)).mean() > 0.9
    with pytest.raises(ConfigError, match=r"index\.factory: IVFnonsense"):
        index.train(choose(IndexConfig(factory="IVFnonsense"), 10, 64), vectors, seed=1)
    with pytest.raises(ConfigError, match=r"index\.factory: IVF4096,Flat over 2000 vectors of 64 dimensions, FAISS says"):
        index.train(choose(IndexConfig(factory="IVF4096,Flat"), 2000, 64), vectors[:2000], seed=1)
    plan = choose(IndexConfig(factory="IDMap,Flat"), 2000, 64)
    with pytest.raises(ConfigError, match=r"index\.factory: adding 2000 vectors, FAISS says"):
        index.build(index.train(plan, vectors, seed=1), vectors.astype(np.float16), range(2000))


@pytest.mark.parametrize("factory", ["IVF16,PQ8x4fs", "PCA32,IVF16,SQ8", "IVF16,Flat"])
def test_an_inverted_file_of_a_factory_in_parts_answers_as_one(tmp_path, vectors, factory):
    halves = vectors.astype(np.float16)
    data = index.train(choose(IndexConfig(factory=factory), len(vectors), 64), vectors, seed=1)
    files = []
    for first, end in ((0, 700), (700, 2000)):
        index.write(index.build(data, halves, range(first, end)), tmp_path / f"{first}.faiss")
        files.append((tmp_path / f"{first}.faiss", first, end - first))
    whole = opened(tmp_path, index.build(data, halves, range(2000)), 2000)
    cut = index_parts.Parts(files, 64)
    same_answers(cut.search(vectors[:20], 10, 8), whole.search(vectors[:20], 10, 8))
    assert (cut.contents(np.arange(0))[0] == 1).all()


def test_merge_leaves_dead_rows_out(tmp_path, vectors, trained):
    kind, data = trained
    ordinals = np.arange(len(vectors))
    ordinals[::3] = -1
    merged = index.merge(data, kind, [(index.Trained(data).encode(vectors, "s"), ordinals)])
    assert merged.ntotal == (ordinals >= 0).sum()
    _, found = opened(tmp_path, merged, merged.ntotal).search(vectors[:50], 20, 64)
    assert not set(found.ravel().tolist()) & set(range(0, len(vectors), 3))


def test_many_tiny_shards_empty_lists_and_large_k(tmp_path, vectors, trained):
    kind, data = trained
    encoder = index.Trained(data)
    shards = [(encoder.encode(vectors[row : row + 1], "s"), np.array([row])) for row in range(50)]
    merged = opened(tmp_path, index.merge(data, kind, shards), 50)
    scores, found = merged.search(vectors[:5], 100, 64)
    assert sorted(found[0][found[0] >= 0].tolist()) == list(range(50))
    assert scores.shape == found.shape == (5, 100)


def test_training_is_seeded(vectors):
    plan = choose(IndexConfig(kind="ivfpq", nlist=16, m=8), len(vectors), 64)
    assert index.train(plan, vectors, seed=5) == index.train(plan, vectors, seed=5)
    assert index.train(plan, vectors, seed=5) != index.train(plan, vectors, seed=6)


def test_written_index_opens_with_plain_faiss(tmp_path, vectors, trained):
    import faiss

    kind, data = trained
    made = index.merge(data, kind, [(index.Trained(data).encode(vectors, "s"), np.arange(len(vectors)))])
    mapped = opened(tmp_path, made, len(vectors))
    plain = faiss.read_index(str(tmp_path / "index.faiss"))
    assert plain.ntotal == len(vectors)
    same_answers(plain.search(vectors[:99], 3), mapped.search(vectors[:99], 3, 1))
    with pytest.raises(VerificationError, match="the manifest says"):
        index_parts.Parts([(tmp_path / "index.faiss", 0, 5)], 64)
    (tmp_path / "garbage.faiss").write_bytes(b"garbage")
    with pytest.raises(VerificationError, match="not readable by FAISS"):
        index_parts.Parts([(tmp_path / "garbage.faiss", 0, 5)], 64)


@pytest.mark.parametrize(
    ("passages", "request_", "kind", "nlist", "why"),
    [
        (1, {}, "flat", 0, "under 9984"),
        (9_983, {}, "flat", 0, "under 9984"),
        (9_984, {}, "ivfpqfs", 256, "9984 passages"),
        (1_000_000, {}, "ivfpqfs", 4096, "1000000 passages"),
        (10, {"kind": "ivfpqfs"}, "flat", 0, "fewer than the 16 centroids"),
        (300, {"kind": "ivfrabitq"}, "ivfrabitq", 4, "nlist shrunk"),
        (300, {"kind": "ivfsq8"}, "ivfsq8", 4, "nlist shrunk"),
        (10, {"kind": "ivfpq"}, "flat", 0, "fewer than the 256 centroids"),
        (300, {"kind": "ivfpq"}, "ivfpq", 4, "nlist shrunk from 64 to 4"),
        (300, {"kind": "ivfpq", "nlist": 100}, "ivfpq", 7, "nlist shrunk from 100 to 7"),
        (50_000, {"kind": "ivfpq", "nlist": 100, "m": 96, "nbits": 4}, "ivfpq", 100, ""),
        (10**6, {"kind": "flat"}, "flat", 0, "index.kind is flat"),
    ],
)
def test_choose_fits_the_corpus_and_says_why(passages, request_, kind, nlist, why):
    plan = choose(IndexConfig(**request_), passages, 384)
    assert (plan.kind, plan.nlist) == (kind, nlist)
    assert why in plan.why
    assert plan.train_vectors <= max(passages, 256)


def test_choose_names_the_m_that_fit():
    with pytest.raises(ConfigError, match=r"dim 384 cannot be cut into 50 parts; choose one of \[32, 48, 64, 96\]"):
        choose(IndexConfig(m=50), 10, 384)


@pytest.mark.parametrize(
    ("dim", "request_", "m", "total"),
    [
        (384, {}, 96, 56),
        (256, {}, 128, 72),
        (768, {}, 96, 56),
        (1024, {}, 128, 72),
        (384, {"max_bytes_per_vector": 200}, 192, 104),
        (384, {"max_bytes_per_vector": 20}, 24, 20),
        (384, {"kind": "ivfpq"}, 48, 56),
        (384, {"kind": "ivfrabitq"}, 0, 64),
        (384, {"kind": "ivfsq8"}, 0, 392),
    ],
)
def test_codes_fit_the_bytes_that_are_allowed(dim, request_, m, total):
    plan = choose(IndexConfig(**request_), 10**6, dim)
    assert plan.m == m
    assert code_bytes(plan.kind, dim, plan.m, plan.nbits) + 8 == total
    assert index_bytes(plan, 10**9, dim) == pytest.approx(total * 10**9, rel=0.05)


def test_a_kind_over_the_allowed_bytes_is_refused():
    with pytest.raises(ConfigError, match="ivfsq8 needs 384 bytes for the code and 8 for the id, the limit is 100"):
        choose(IndexConfig(kind="ivfsq8", max_bytes_per_vector=100), 10**6, 384)
    with pytest.raises(ConfigError, match="fast scan has 4 bits, not 8"):
        choose(IndexConfig(kind="ivfpqfs", nbits=8), 10**6, 384)


def test_non_finite_vectors_are_refused_by_name(vectors, trained):
    bad = vectors[:20].copy()
    bad[7, 3] = np.nan
    with pytest.raises(VerificationError, match=r"shard-x: row 7 is not finite"):
        index.Trained(trained[1]).encode(bad, "shard-x")
    with pytest.raises(VerificationError, match="32 dimensions, the trained index has 64"):
        index.Trained(trained[1]).encode(np.zeros((2, 32), np.float32), "shard-y")


@pytest.mark.parametrize("parts", [1, 3])
def test_contents_are_the_codes_that_were_merged(tmp_path, vectors, trained, parts):
    kind, data = trained
    codes = index.Trained(data).encode(vectors, "vectors")
    cuts = np.array_split(np.arange(len(vectors)), parts)
    files = []
    for number, cut in enumerate(cuts):
        index.write(index.merge(data, kind, [(codes[cut], cut)]), tmp_path / str(number))
        files.append((tmp_path / str(number), int(cut[0]), len(cut)))
    sample = np.arange(5, len(vectors), 97)
    times, found = index_parts.Parts(files, 64).contents(sample)
    assert (times == 1).all()
    assert len(times) == len(vectors)
    assert (found == codes[sample]).all()


def test_contents_tell_what_is_there_twice_or_not_at_all(tmp_path, vectors, trained):
    kind, data = trained
    codes = index.Trained(data).encode(vectors[:100], "vectors")
    ordinals = np.arange(100)
    ordinals[40] = 41
    made = opened(tmp_path, index.merge(data, kind, [(codes, ordinals)]), 100)
    times, _ = made.contents(np.arange(0))
    assert (times[39], times[40], times[41]) == (1, 0, 2)
