import numpy as np
import pytest

from pipeline.ann import recall
from pipeline.root.shards import KEY_DTYPE


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(0)
    made = rng.standard_normal((70_000, 16)).astype(np.float32)
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float16)


def keys(count, seed=0):
    return np.sort(np.frombuffer(np.random.default_rng(seed).bytes(16 * count), dtype=KEY_DTYPE))


def test_exact_search_equals_sorting_everything(vectors):
    queries = vectors[5:9].astype(np.float32)
    scores, ordinals = recall.exact_search(vectors, queries, 10)
    everything = queries @ vectors.astype(np.float32).T
    for row in range(4):
        best = np.lexsort((np.arange(len(vectors)), -everything[row]))[:10]
        assert ordinals[row].tolist() == best.tolist()
        assert np.allclose(scores[row], everything[row][best], atol=1e-6)


def test_exact_search_with_few_vectors_returns_all(vectors):
    scores, ordinals = recall.exact_search(vectors[:3], vectors[:2].astype(np.float32), 10)
    assert scores.shape == ordinals.shape == (2, 3)


def test_recall_counts_ties_and_misses():
    exact = np.array([[0.9, 0.8, 0.7], [0.9, 0.8, 0.7]], dtype=np.float32)
    found = np.array([[0.9, 0.7, 0.7 - 5e-7], [0.9, 0.5, -np.inf]], dtype=np.float32)
    measured = recall.recall(found, exact)
    assert measured.mean == pytest.approx((1 + 1 / 3) / 2)
    assert measured.low < measured.mean < measured.high
    assert recall.recall(found[:0], exact[:0]).queries == 0


def test_drop_self_removes_the_query_or_the_last():
    scores = np.array([[1.0, 0.9, 0.8], [0.9, 0.8, 0.7]], dtype=np.float32)
    kept, ordinals = recall.drop_self(scores, np.array([[5, 1, 2], [1, 2, 3]]), np.array([5, 9]), 2)
    assert ordinals.tolist() == [[1, 2], [1, 2]]
    assert kept.tolist() == scores[[0, 1]][:, [1, 2]][:1].tolist() + scores[1:, :2].tolist()


def test_samples_are_uniform_stable_and_apart():
    many = keys(50_000)
    queries = recall.held_out(many, 1000, 7)
    sample = recall.training_sample(many, 20_000, 7, queries)
    assert len(queries) == 1000
    assert len(sample) == 20_000
    assert not set(queries.tolist()) & set(sample.tolist())
    assert abs(sample.mean() / len(many) - 0.5) < 0.02
    fewer = np.delete(many, np.arange(0, 50_000, 100))
    kept = {many[ordinal] for ordinal in queries} & {fewer[ordinal] for ordinal in recall.held_out(fewer, 1000, 7)}
    assert len(kept) > 950
    assert recall.held_out(many, 1000, 8).tolist() != queries.tolist()


@pytest.mark.parametrize("count", [1, 2, 10, 99])
def test_tiny_corpora_train_and_ask_with_everything(count):
    few = keys(count)
    assert recall.held_out(few, 1000, 1).tolist() == list(range(count))
    assert len(recall.training_sample(few, 1000, 1, recall.held_out(few, 1000, 1))) == count
