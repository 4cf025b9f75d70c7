"""A trained index is kept while it fits, and trained again in the same run when it does not."""

import faiss
import numpy as np
import pytest

from pipeline.ann import drift
from pipeline.ann.index import Trained, train
from pipeline.ann.index_plan import choose
from pipeline.artifacts.artifact import read_manifest
from pipeline.artifacts.publish import live_artifact
from pipeline.config_what import IndexConfig
from pipeline.root.manifest import Evaluation, Health, OperatingPoint
from pipeline.root.storage import Storage
from pipeline.run import reindex
from tests.conftest import make_config, sentences, write_jsonl
from tests.faults import alone as stand_in
from tests.faults.alone import alone as alone  # a fixture

POINT = OperatingPoint(nprobe=4, rescore=4, recall=0.995, latency_ms=1.0)
FITTING = Evaluation(
    asked="this", k=10, queries=100, source="sampled passages", recall=0.995, recall_low=0.99, recall_high=1.0, gated=True,
    point=POINT, points=(POINT,), health=Health(lists=100, empty_lists=2, imbalance=1.2, quantization_error=0.3),
)  # fmt: skip


class _Before:
    """As much of an artifact as a judge looks at."""

    def __init__(self, trained="t"):
        self.index, self.baseline, self.drifted = type("Index", (), {"trained": trained}), FITTING, ()


def _judged(before=None, **changes):
    config = make_config("root", "corpus", publish={"min_recall": 0.9}, index={"target_recall": 0.99})
    health = {name: changes.pop(name) for name in ("empty_lists", "imbalance", "quantization_error") if name in changes}
    now = FITTING.model_copy(update=changes | {"health": FITTING.health.model_copy(update=health)})
    return drift.judge(now, _Before().index, before or _Before(), config)


def test_an_index_at_its_limits_fits_still():
    verdict = _judged(empty_lists=12, imbalance=1.79, quantization_error=0.3299, recall=0.985, recall_high=0.99)
    assert not verdict.reasons and verdict.baseline is FITTING
    for number in ("12 (2 when trained, limit 12)", "1.79 (1.20", "limit 1.80", "0.3299 (0.3000", "0.9850 (0.9950"):
        assert number in verdict.numbers


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"imbalance": 1.81}, "imbalance 1.81"),
        ({"empty_lists": 13}, "empty lists of 100 13"),
        ({"quantization_error": 0.331}, "quantization error 0.3310"),
        ({"recall": 0.98, "recall_high": 0.989}, "recall@10 0.9800"),
        ({"recall": 0.89, "recall_high": 0.92, "asked": "other"}, "recall@10 0.8900"),
    ],
)
def test_each_measure_alone_says_train_again(changes, reason):
    (found,) = _judged(**changes).reasons
    assert found.startswith(reason)
    assert not _judged(**changes, gated=False).reasons


def test_recall_for_other_wishes_is_compared_with_the_gate_alone():
    assert not _judged(recall=0.95, recall_high=0.96, asked="other").reasons


def test_a_new_trained_index_is_its_own_baseline():
    verdict = _judged(before=_Before("another"), imbalance=9.0)
    assert verdict.baseline is None and not verdict.reasons


@pytest.mark.parametrize("kind", ["ivfpq", "ivfpqfs", "ivfsq8", "ivfrabitq"])
def test_health_is_what_faiss_says(kind):
    vectors = np.random.default_rng(7).standard_normal((4000, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    data = train(choose(IndexConfig(kind=kind), len(vectors), 64), vectors, seed=1)
    plain = faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))
    plain.add(vectors)
    lists = faiss.extract_index_ivf(plain).invlists
    sizes = [lists.list_size(number) for number in range(lists.nlist)]
    health = drift.measure(sizes, Trained(data), vectors)
    assert health.lists == lists.nlist > 1
    assert health.imbalance == pytest.approx(lists.imbalance_factor(), rel=1e-6)
    assert health.empty_lists == sizes.count(0)
    decoded = plain.sa_decode(plain.sa_encode(vectors))
    assert health.quantization_error == pytest.approx(np.square(vectors - decoded).sum(axis=1).mean(), rel=0.01)


@pytest.mark.usefixtures("alone")
def test_a_corpus_that_drifts_is_trained_for_again_in_the_same_run(tmp_path, monkeypatch):
    config = make_config(tmp_path / "root", tmp_path / "corpus", index={"kind": "ivfpq", "nlist": 16})
    write_jsonl(tmp_path / "corpus/0.jsonl", sentences(1000))
    first = reindex(config).live
    assert first.verdict == "trained for this corpus" and first.baseline == first.evaluation

    write_jsonl(tmp_path / "corpus/1.jsonl", sentences(20, 1000))
    second = reindex(config)
    assert (second.trained, second.encoded, second.live.drifted) == (False, 20, ())
    assert second.live.verdict.startswith("fits still: imbalance ")
    assert second.live.baseline == first.evaluation != second.live.evaluation

    write_jsonl(tmp_path / "corpus/2.jsonl", sentences(800, 1020))
    scattered = stand_in._vector

    def crowded(text, dim):
        vector = scattered(text, dim) + 6 * scattered(b"one place", dim) + 3 * scattered(bytes([sum(text) % 8]), dim)
        return vector / np.linalg.norm(vector)

    monkeypatch.setattr(stand_in, "_vector", crowded)
    third = reindex(config)
    assert (third.trained, third.encoded, third.committed) == (True, 800, True)
    assert third.index_shards == 2 + 5  # of what is new with the old trained index, then all with the new one
    assert third.live.index.trained != first.index.trained
    assert "because the one before has drifted: imbalance " in third.live.verdict
    assert third.live.baseline == third.live.evaluation
    artifacts = [read_manifest(file.read_bytes(), str(file)) for file in (tmp_path / "root/artifacts").glob("*/manifest.json")]
    (drifted,) = (artifact for artifact in artifacts if artifact.drifted)
    assert drifted.index.trained == first.index.trained
    assert third.live.evaluation.health.imbalance < drifted.evaluation.health.imbalance
    assert reindex(config).built is None
    assert live_artifact(Storage(config.root, config.store)) == third.live
