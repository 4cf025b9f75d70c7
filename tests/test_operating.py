import numpy as np
import pytest

from pipeline.ann import operating, recall
from pipeline.ann.collection import Collection
from pipeline.ann.vectors import INT8, Int8Vectors, write_int8
from pipeline.errors import ConfigError
from pipeline.root.manifest import OperatingPoint
from tests.test_index import unit_vectors


class PartialIndex:
    """Exact search over the first vectors: 1,000 for each list that is visited; candidates in a slightly wrong order."""

    lists = 16

    def __init__(self, vectors):
        self.vectors = vectors
        self.ordinals = range(len(vectors))

    def search(self, queries, k, nprobe, allowed=None):
        noisy = queries + 0.02 * unit_vectors(len(queries), seed=5)
        return recall.exact_search(self.vectors[: 1000 * nprobe], noisy, k)


@pytest.fixture(scope="module")
def vectors():
    return unit_vectors(16_000).astype(np.float16)


@pytest.fixture(scope="module", params=["float16", "int8", "none"])
def collection(request, vectors, tmp_path_factory):
    file = tmp_path_factory.mktemp("vectors") / INT8
    write_int8(vectors, file)
    rescorer = {"float16": vectors, "int8": Int8Vectors(file, 64), "none": None}[request.param]
    return Collection(PartialIndex(vectors), vectors, rescorer)


@pytest.fixture(scope="module")
def truth(vectors):
    own = np.arange(0, 16_000, 160)
    return operating.ground_truth(vectors, vectors[own].astype(np.float32), own, 10)


def test_recall_of_each_setting_is_that_of_searching_with_it(collection, vectors, truth):
    measured = operating.measure(collection, truth, 0.99)
    assert len(measured) > 3
    for each in measured:
        point = each.point
        scores, ordinals = collection.search(truth.queries, 11, nprobe=point.nprobe, rescoring=point.rescore)
        _, ordinals = recall.drop_self(scores, ordinals, truth.own, 10)
        scores = recall.score(vectors, truth.queries, ordinals)
        assert point.recall == pytest.approx(recall.recall(scores, truth.scores).mean)
        assert each.recall.queries == 100
    assert measured[-1].point.nprobe == 16
    least = {Int8Vectors: 0.97, type(None): 0.6}
    assert measured[-1].point.recall > least.get(type(collection.rescorer), 0.99)
    assert {each.point.rescore for each in measured} <= ({0} if collection.rescorer is None else {5, 10, 20, 50, 100})
    kept = [(each.point.nprobe, each.point.rescore, each.point.recall) for each in measured]
    for nprobe, rescore, found in kept:
        assert not any(a <= nprobe and b <= rescore and c >= found for a, b, c in kept if (a, b) != (nprobe, rescore))


def test_a_given_setting_is_kept(vectors, truth):
    collection = Collection(PartialIndex(vectors), vectors, vectors)
    measured = operating.measure(collection, truth, 0.99, nprobe=4, rescoring=10)
    assert [(each.point.nprobe, each.point.rescore) for each in measured] == [(4, 10)]
    assert measured[0].point.recall < 0.5


def test_ladder_is_cheap_first_and_reaches_every_list():
    assert operating._ladder(0) == [0]
    assert operating._ladder(1) == [1]
    assert operating._ladder(16) == [1, 2, 3, 4, 6, 8, 12, 16]
    assert operating._ladder(20) == [1, 2, 3, 4, 6, 8, 12, 16, 20]


def measured(*settings):
    interval = recall.Recall(0.5, 0.4, 0.6, 100)
    return [
        operating.Measured(OperatingPoint(nprobe=nprobe, rescore=10, recall=found, latency_ms=latency), interval)
        for nprobe, found, latency in settings
    ]


def test_choose_takes_the_fastest_that_is_good_enough():
    settings = measured((1, 0.8, 1.0), (2, 0.95, 3.0), (4, 0.96, 2.0), (8, 0.99, 10.0))
    for target, limit, nprobe in [(0.95, None, 4), (0.5, None, 1), (0.999, None, 8), (0.99, 5.0, 4), (0.99, 0.1, 1)]:
        assert operating.choose(settings, target, limit).point.nprobe == nprobe


def test_choose_takes_differences_under_a_tenth_of_a_millisecond_for_noise():
    for times in ((0.11, 0.10, 0.19), (0.10, 0.19, 0.11), (0.19, 0.11, 0.10)):
        settings = measured(*zip((1, 2, 4), (0.96, 0.97, 0.98), times, strict=True))
        assert operating.choose(settings, 0.95, None).point.nprobe == 4


def test_pick_answers_wishes_or_says_what_there_is():
    points = [each.point for each in measured((1, 0.8, 0.1), (2, 0.95, 0.3), (4, 0.96, 0.2), (8, 0.99, 1.0))]
    assert operating.pick(points, recall=0.9).nprobe == 4
    assert operating.pick(points, latency_ms=0.5).nprobe == 4
    assert operating.pick(points, recall=0.9, latency_ms=2).nprobe == 8
    with pytest.raises(ConfigError, match=r"--recall 0.999: the measured settings of this artifact reach 0.9900"):
        operating.pick(points, recall=0.999)
    with pytest.raises(ConfigError, match=r"--latency 0.05ms: the fastest measured setting takes 0.10 ms"):
        operating.pick(points, latency_ms=0.05)
