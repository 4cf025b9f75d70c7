import numpy as np
import pytest

from pipeline.ann import collection, index
from pipeline.ann.collection import Collection
from pipeline.ann.index_parts import Parts
from pipeline.ann.index_plan import choose
from pipeline.ann.recall import exact_search
from pipeline.config_what import IndexConfig
from tests.test_index import unit_vectors

COUNT, DIM, K = 40_000, 32, 10
QUERIES = unit_vectors(50, DIM, seed=9)


@pytest.fixture(scope="module", params=["flat", "ivfpqfs", "ivfsq8"])
def opened(request, tmp_path_factory):
    vectors = unit_vectors(COUNT, DIM).astype(np.float16)
    floats, file = vectors.astype(np.float32), tmp_path_factory.mktemp("collection") / "index.faiss"
    if request.param == "flat":
        made = index.build(None, vectors, range(COUNT))
    else:
        plan = choose(IndexConfig(kind=request.param, nlist=128), COUNT, DIM)
        data = index.train(plan, floats, seed=1)
        codes = index.Trained(data).encode(floats, "shard")
        made = index.merge(data, plan.kind, [(codes, np.arange(COUNT))])
    index.write(made, file)
    return Collection(Parts([(file, 0, COUNT)], DIM, mapped=index.can_be_mapped(made)), vectors, vectors)


def brute_force(vectors, allowed):
    chosen = np.flatnonzero(allowed)
    scores, rows = exact_search(vectors[chosen], QUERIES, min(K, len(chosen)))
    return scores, chosen[rows]


@pytest.mark.parametrize("selectivity", [0.5, 0.01, 0.0001, 0])
def test_a_filtered_search_is_brute_force_over_what_passes(opened, selectivity):
    allowed = np.random.default_rng(2).random(COUNT) < selectivity
    expected_scores, expected = brute_force(opened.vectors, allowed)
    scores, ordinals = opened.search(QUERIES, K, nprobe=4, rescoring=8, allowed=allowed)
    assert scores.shape == ordinals.shape == (len(QUERIES), K)
    found = expected.shape[1]
    assert scores[:, :found] == pytest.approx(expected_scores, abs=1e-5)
    assert ((ordinals[:, :found] == expected) | np.isclose(scores[:, :found], expected_scores, atol=1e-6)).all()
    assert (ordinals[:, found:] == -1).all()


def test_many_passing_are_found_by_the_index(opened, monkeypatch):
    """What passes lies together, as it does in real corpora: in a few lists that few queries are near."""
    monkeypatch.setattr(collection, "EXACT_FLOATS", 0)
    centre = unit_vectors(1, DIM, seed=4)[0]
    near = opened.vectors.astype(np.float32) @ centre
    for allowed in (near > np.quantile(near, 0.7), np.random.default_rng(2).random(COUNT) < 0.3):
        expected_scores, _ = brute_force(opened.vectors, allowed)
        scores, ordinals = opened.search(QUERIES, K, nprobe=16, rescoring=8, allowed=allowed)
        assert allowed[ordinals].all()
        assert (scores >= expected_scores[:, -1:] - 1e-6).mean() >= 0.97
