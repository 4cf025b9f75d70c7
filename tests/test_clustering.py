import numpy as np
import pytest

from pipeline.ann import clustering
from tests.test_index import unit_vectors


@pytest.fixture(scope="module")
def vectors():
    return unit_vectors(20_000, dim=32)


@pytest.mark.parametrize("nlist", [1, 7, 600, 1100])
def test_centroids_are_unit_distinct_and_seeded(vectors, nlist):
    centroids = clustering.train_centroids(vectors, nlist, seed=1)
    assert centroids.shape == (nlist, 32)
    assert np.allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    assert len(np.unique(centroids, axis=0)) == nlist
    assert (centroids == clustering.train_centroids(vectors, nlist, seed=1)).all()


def test_hierarchical_centroids_are_nearly_as_near_as_flat_ones(vectors, monkeypatch):
    def mean_nearest(centroids):
        return float((vectors @ centroids.T).max(axis=1).mean())

    hierarchical = mean_nearest(clustering.train_centroids(vectors, 1100, seed=1))
    monkeypatch.setattr(clustering, "LISTS_PER_GROUP", 10_000)
    flat = mean_nearest(clustering.train_centroids(vectors, 1100, seed=1))
    assert hierarchical > flat - 0.01


def test_more_centroids_than_distinct_vectors():
    few = np.tile(unit_vectors(3, dim=32), (20, 1))
    assert clustering.train_centroids(few, 8, seed=1).shape == (8, 32)


def test_assignment_is_exact_for_few_lists_and_agrees_for_many(vectors, monkeypatch):
    centroids = clustering.train_centroids(vectors, 1024, seed=1)
    nearest = (vectors @ centroids.T).argmax(axis=1)
    exact = clustering.Assigner(centroids)
    assert exact.is_exact
    assert (exact(vectors) == nearest).mean() > 0.9999
    monkeypatch.setattr(clustering, "TWO_LEVEL_FROM", 1024)
    grouped = clustering.Assigner(centroids)
    assert not grouped.is_exact
    lists = grouped(vectors)
    assert grouped.agreement(vectors) == pytest.approx((lists == nearest).mean(), abs=1e-3)
    assert grouped.agreement(vectors) > 0.9
    lost = (vectors * (centroids[nearest] - centroids[lists])).sum(axis=1)
    assert 0 <= lost.mean() < 0.005
    assert grouped(vectors[:1]).tolist() == lists[:1].tolist()
