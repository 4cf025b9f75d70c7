"""What a run tells: rates without start-up, states in files, and a storage that is away."""

import io
import json
import re
import time

import pytest
from rich.console import Console

from jobs.options import _bars, print_result, progress
from jobs.status import _runs
from pipeline.errors import DataError
from pipeline.root import journal, layout
from pipeline.root.job import Event, Meter, plan_job, stage
from pipeline.root.journal import RunState, last_runs
from pipeline.root.log import Log, writing
from pipeline.root.manifest import load, to_bytes
from pipeline.root.storage import Storage
from tests.conftest import make_config


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_rate_and_time_to_go_leave_start_up_out(clock):
    told = []
    meter = Meter("r", told.append)
    for seconds, done, tokens in ((0, 0, 0), (60, 0, 0), (0, 100, 1000), (10, 300, 3000), (5, 400, 4000)):
        clock[0] += seconds
        meter(Event("embed", "", done, 1000, {"passages": done, "tokens": tokens}))
    assert [event.rate for event in told[:3]] == [{}, {}, {}]
    assert told[3].rate == {"passages": 20.0, "tokens": 200.0}
    assert (told[4].rate["passages"], told[4].eta_s, told[4].elapsed_s) == (20.0, 30.0, 75.0)
    assert {event.run for event in told} == {"r"}
    meter(Event("embed", ended=True))
    clock[0] += 50
    meter(Event("embed"))
    assert told[-1].elapsed_s == 0.0


def test_a_stage_tells_its_begin_and_end_and_keeps_its_time_whatever_happens(tmp_path):
    told = []
    job = plan_job(make_config(tmp_path, tmp_path.parent / "a.jsonl"), on_gpu=False, say=told.append)

    @stage("ingest")
    def fail(_job):
        raise DataError("no")

    with pytest.raises(DataError):
        fail(job)
    assert [(event.stage, event.ended) for event in told] == [("ingest", False), ("ingest", True)]
    assert job.stages_s["ingest"] >= 0


@pytest.fixture
def job(tmp_path):
    return plan_job(make_config(tmp_path / "root", tmp_path / "a.jsonl"), on_gpu=False)


def test_states_of_a_run_are_created_once_and_the_last_says_how_it_ended(job, monkeypatch):
    monkeypatch.setattr(journal, "MIN_INTERVAL_S", 0.01)
    with journal.journal(job) as written:
        written.say(Event("ingest"))
        for done in range(1000):
            written.say(Event("ingest", "", done, 1000, {"rows": done}))
        written.say(Event("ingest", "1000 rows", 1000, 1000))
        written.say(Event("ingest", ended=True))
    files = job.storage.list(layout.events(job.run_id))
    assert [path.rpartition("/")[2] for path in files] == [f"{number:06d}.json" for number in range(len(files))]
    assert 1 <= len(files) < 10
    (run,) = last_runs(job.storage, 5)
    assert (run.run, run.state, run.why) == (job.run_id, "finished", "")
    (ingest,) = run.stages
    assert (ingest.stage, ingest.message, ingest.done, ingest.total, ingest.ended) == ("ingest", "1000 rows", 1000, 1000, True)
    assert ingest.counts == {"rows": 999}


def test_a_run_tried_again_under_its_name_is_the_last_to_be_read(job):
    for error in (DataError("first"), DataError("second")):
        with pytest.raises(DataError), journal.journal(job) as written:
            written.say(Event("ingest"))
            raise error
    assert last_runs(job.storage, 5)[0].why == "second"


@pytest.mark.parametrize(
    ("error", "state", "why"),
    [(DataError("a.jsonl: no rows"), "failed", "a.jsonl: no rows"), (KeyError("x"), "failed", "KeyError, a bug"),
     (KeyboardInterrupt(), "stopped", "")],
)  # fmt: skip
def test_a_run_that_ends_badly_says_so(job, error, state, why):
    with pytest.raises(type(error)), journal.journal(job) as written:
        written.say(Event("ingest"))
        raise error
    (run,) = last_runs(job.storage, 5)
    assert (run.state, run.why) == (state, why)


def test_a_storage_that_takes_no_events_never_fails_the_run(tmp_path):
    (tmp_path / "root").write_text("a file where a folder should be")
    job = plan_job(make_config(tmp_path / "root", tmp_path / "a.jsonl"), on_gpu=False)
    told = []
    with journal.journal(job) as written:
        written.say.also(told.append)(Event("ingest"))
    assert told[0].stage == "ingest"


def test_status_tells_live_runs_from_dead_ones(job):
    storage = job.storage
    for run in ("20260101T000000-dead", "20260102T000000-live"):
        state = RunState(run=run, at="2026-01-02T00:00:00+00:00")
        storage.create(f"{layout.events(run)}/000000.json", to_bytes(state))
    with writing(storage, "20260102T000000-live", 30) as lease:
        while not storage.exists(layout.beat(lease.epoch, 0)):
            time.sleep(0.01)
        live, dead = _runs(storage, Log(storage).refresh().holder)
        assert (live["state"], dead["state"]) == ("running", "died")
        assert live["seen"] > dead["seen"] == "2026-01-02T00:00:00+00:00"
    assert load(RunState, storage, f"{layout.events('20260102T000000-live')}/000000.json").state == "running"
    assert [run["state"] for run in _runs(Storage(storage.uri), None)] == ["died", "died"]


def test_stream_has_one_line_per_event_and_thins_out_progress(clock, capsys):
    with progress(quiet=True, as_json=True) as say:
        say(Event("embed"))
        for done in range(100):
            clock[0] += 0.1
            say(Event("embed", "", done, 100))
        say(Event("embed", "100 passages encoded", 100, 100))
    print_result({"encoded": 100})
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines] == ["stage"] * (len(lines) - 1) + ["result"]
    assert 3 <= sum(line.get("total") == 100 and not line["message"] for line in lines[:-1]) <= 5
    assert lines[-2]["message"] == "100 passages encoded"
    assert lines[-1] == {"event": "result", "encoded": 100}


def test_terminal_shows_rate_and_time_to_go(clock):
    screen = Console(file=io.StringIO(), force_terminal=True, highlight=False, width=160)
    with _bars(screen) as say:
        meter = Meter("r", say)
        for done in (0, 100, 300):
            clock[0] += 10
            meter(Event("embed", "", done, 900, {"passages": done, "tokens": 50 * done}))
        say._bars.refresh()
        meter(Event("embed", "900 passages encoded", 900, 900))
    shown = screen.file.getvalue()
    assert "300/900 20 passages/s, 1,000 tokens/s" in re.sub(r"\x1b\[[\d;?]*\w", "", shown)
    assert "0:00:30 to go" in re.sub(r"\x1b\[[\d;?]*\w", "", shown)
    assert "embed: 900 passages encoded" in shown
