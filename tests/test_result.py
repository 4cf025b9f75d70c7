"""Results of runs, and what they and the log say of the past."""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from pipeline.errors import ConfigError, StorageError
from pipeline.operations import upkeep
from pipeline.root import layout
from pipeline.root.log import writing
from pipeline.root.result import (
    History,
    RunResult,
    check_name,
    history,
    next_attempt,
    one_line,
    read_result,
    remembered,
    scheduled_name,
    write_result,
)
from pipeline.root.storage import Storage
from pipeline.run import reindex
from tests.conftest import make_config, sentences, write_jsonl
from tests.faults.alone import alone as alone  # a fixture

TICK = datetime(2026, 11, 24, 3, tzinfo=UTC)
DAY = timedelta(days=1)
NOW = datetime.now(UTC) + 10 * DAY


def end(storage, run, code, started=TICK):
    result = RunResult(run=run, exit_code=code, error="why" if code else None, started=started, ended=started)
    return write_result(storage, result)


def commit(storage, run, artifact):
    """Commit as a run does; returns when it began."""
    with writing(storage, run, 30) as lease:
        lease.commit(artifact.format(lease.epoch), "0" * 64)
    return datetime.fromisoformat(next(entry.at for entry in lease._log.refresh().entries if entry.number == lease.epoch))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "x" * 101, "a\n"])
def test_check_name_refuses_what_is_no_name(tmp_path, name):
    with pytest.raises(ConfigError, match="expected at most 100 letters"):
        check_name(Storage(str(tmp_path)), name)


def test_a_result_is_written_once_and_its_name_is_used_up(tmp_path):
    storage = Storage(str(tmp_path))
    check_name(storage, "nightly-1.0")
    assert end(storage, "nightly-1.0", 3)
    assert not end(storage, "nightly-1.0", 0)
    assert read_result(storage, "nightly-1.0").exit_code == 3
    with pytest.raises(ConfigError, match="this run has ended"):
        check_name(storage, "nightly-1.0")


def test_a_run_that_is_locked_out_by_its_namesake_leaves_it_the_result(tmp_path):
    storage = Storage(str(tmp_path))
    with writing(storage, "tonight", 30):
        assert not end(storage, "tonight", 4)
        assert end(storage, "another", 4)
    assert read_result(storage, "tonight") is None


def test_one_line_names_a_bug_and_keeps_a_text():
    assert one_line(StorageError("s3://b: cannot\nread it")) == "s3://b: cannot read it"
    assert one_line(KeyboardInterrupt()) == "stopped by a signal"
    assert one_line(ZeroDivisionError()) == "ZeroDivisionError"
    assert len(one_line(StorageError("x" * 10_000))) == 1000


def test_history_of_an_empty_root_is_empty(tmp_path):
    assert history(Storage(str(tmp_path / "root")), NOW) == History()


def test_history_goes_by_the_last_tick_that_was_not_stopped(tmp_path):
    storage = Storage(str(tmp_path))
    late = timedelta(minutes=7)
    end(storage, scheduled_name("00aa", TICK - 2 * DAY, 1), 0, TICK - 2 * DAY + late)
    end(storage, scheduled_name("00bb", TICK - DAY, 1), 5, TICK - DAY)
    end(storage, scheduled_name("00bb", TICK, 1), 143, TICK)
    end(storage, "by-hand", 0, TICK + DAY)
    (tmp_path / "runs" / scheduled_name("00bb", TICK + DAY, 1)).mkdir()  # it began and was killed
    assert history(storage, NOW) == History(settled=TICK - DAY, succeeded=TICK - 2 * DAY + late)
    assert next_attempt(storage, "00bb", TICK) == scheduled_name("00bb", TICK, 2)
    assert next_attempt(storage, "00bb", TICK + DAY) == scheduled_name("00bb", TICK + DAY, 1)


def test_history_knows_commits_when_results_are_gone_and_no_rollback_settles_a_tick(tmp_path):
    storage = Storage(str(tmp_path))
    began = commit(storage, "a", "{:06d}-abcdef")
    assert history(storage, NOW) == History(settled=began, succeeded=began)
    commit(storage, "b", "000000-abcdef")
    assert history(storage, NOW) == History(settled=began, succeeded=began)
    later = began + DAY
    end(storage, scheduled_name("00aa", later, 1), 0, later)
    assert history(storage, NOW) == History(settled=later.replace(second=0), succeeded=later)


@pytest.mark.usefixtures("alone")
def test_gc_keeps_the_results_that_a_scheduler_rests_on(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", sentences(5))
    config = make_config(tmp_path / "root", tmp_path / "a.jsonl", index={"kind": "flat"})
    reindex(config)
    storage = Storage(config.root)
    names = [scheduled_name("abc123", TICK + 1000 * DAY + day * DAY, 1) for day in range(5)]
    for name, code in zip(names, (0, 0, 3, 1, 143), strict=True):
        end(storage, name, code, TICK + 1000 * DAY)
    later = TICK + 1005 * DAY
    before = history(storage, later)
    assert before.settled == TICK + 1003 * DAY
    monkeypatch.setattr(upkeep, "datetime", SimpleNamespace(now=lambda _zone: later))
    upkeep.collect(config, keep=1, grace_s=-1)
    assert history(storage, later) == before
    assert [name for name in names if read_result(storage, name)] == [names[1], names[3]]


def test_what_a_clock_that_was_ahead_has_dated_settles_nothing(tmp_path):
    storage = Storage(str(tmp_path))
    began = commit(storage, "a", "{:06d}-abcdef")
    end(storage, scheduled_name("00aa", TICK, 1), 0, TICK)
    ahead = NOW + 365 * DAY
    end(storage, scheduled_name("00aa", ahead, 1), 0, ahead)
    end(storage, scheduled_name("00aa", TICK + timedelta(hours=1), 1), 0, ahead)
    assert history(storage, TICK + DAY / 48) == History(settled=TICK, succeeded=TICK)
    assert history(storage, TICK + DAY / 12) == History(settled=TICK + DAY / 24, succeeded=TICK), (
        "a tick that is past is settled"
    )
    assert history(storage, NOW) == History(settled=began, succeeded=began)
    assert history(storage, ahead).succeeded == ahead
    names = (scheduled_name("00aa", tick, 1) for tick in (TICK, TICK + DAY / 24))
    assert remembered(storage, NOW) == {layout.run(name, "result.json") for name in names}
