"""What a partition of the service has open, without Ray."""

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest

from pipeline.artifacts.live import open_live
from pipeline.errors import VerificationError
from pipeline.operations.upkeep import rollback
from pipeline.run import reindex
from pipeline.search.partition import Depth
from pipeline.service import holding
from pipeline.service.following import Refusal
from pipeline.service.holding import KEPT, Holding
from tests.conftest import eventually, make_config, sentences, write_jsonl
from tests.faults.alone import alone as alone  # a fixture

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def config(tmp_path):
    """A root with three artifacts of two index files each; the last is live."""
    made = make_config(tmp_path / "root", tmp_path / "a.jsonl", index={"kind": "flat", "partitions": 2}, serve={"poll_s": 0.05})
    for number in range(3):
        write_jsonl(tmp_path / "a.jsonl", sentences(30, start=100 * number))
        assert reindex(made).committed
    return made


def versions(config):
    return sorted(path.name for path in (Path(config.root) / "artifacts").iterdir())


def test_the_live_one_and_the_one_before_are_open(config):
    first, second, third = versions(config)
    held = Holding(config, None, 1, 2)
    assert list(held._held) == [third]
    assert held.partition(third).ordinals == range(15, 30)
    (row,) = held.answer(third, "rows", (np.array([15]), None))[15]
    assert row["text"] in {row["text"] for row in sentences(30, start=200)}
    old = weakref.ref(held.partition(second))
    assert held.answer(second, "dense", (np.ones((1, 384), np.float32), Depth(3), None)).ordinals.min() >= 15
    assert set(held._held) == {second, third}
    held.partition(third)
    held.partition(first)
    assert set(held._held) == {first, third}
    gc.collect()
    assert old() is None
    held.close()


def test_what_goes_live_is_opened_before_anybody_asks(config, monkeypatch):
    first, _, third = versions(config)
    held = Holding(config, None, 0, 2)
    rollback(config, first)
    eventually(lambda: first in held._held)
    assert set(held._held) == {first, third}
    assert len(held._held) <= KEPT
    monkeypatch.setattr(holding, "open_share", None)
    assert held.partition(third).ordinals == range(15)
    held.close()


def test_what_is_broken_or_gone_is_no_question_of_the_client(config):
    first, second, third = versions(config)
    held = Holding(config, None, 0, 2)
    file = Path(config.root) / "artifacts" / first / "index-0000.faiss"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.unlink()
    file.write_bytes(data)
    (Path(config.root) / "artifacts" / second / "manifest.json").unlink()
    with pytest.raises(VerificationError, match="index-0000"):
        held.partition(first)
    with pytest.raises(VerificationError, match=r"no manifest\.json"):
        held.partition(second)
    assert held.partition(third).ordinals == range(15)
    held.close()


def test_a_fixed_artifact_is_the_only_one(config):
    first, _, third = versions(config)
    held = Holding(None, f"{config.root}/artifacts/{first}", 0, 2)
    assert held.partition(first).ordinals == range(15)
    with pytest.raises(VerificationError, match=f"artifact {first} is there, {third} is asked for"):
        held.partition(third)
    assert open_live(config).manifest.version == third


def test_a_partition_starts_while_what_is_live_is_broken_and_answers_what_was_before(config):
    _, second, third = versions(config)
    (Path(config.root) / "artifacts" / third / "vectors.f16").unlink()
    held = Holding(config, None, 0, 2)
    assert not held._held
    with pytest.raises(VerificationError, match="vectors"):
        held.partition(third)
    assert held.partition(second).ordinals == range(15)
    held.close()


def test_what_is_refused_is_tried_again_after_twice_as_long(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("pipeline.service.following.time.monotonic", lambda: clock[0])
    refusal, waits = Refusal(), []
    for _ in range(8):
        refusal.again("a")
        waits.append(next(wait for wait in range(0, 10_000, 60) if not later(refusal, clock, wait)))
    assert waits == [60, 120, 240, 480, 900, 900, 900, 900]
    assert not refusal.holds("b")
    refusal.again("b")
    assert (refusal.holds("b"), later(refusal, clock, 60, "b")) == (True, False)


def later(refusal, clock, wait, what="a"):
    """Whether it still holds after so many seconds."""
    before, clock[0] = clock[0], clock[0] + wait
    holds = refusal.holds(what)
    clock[0] = before
    return holds
