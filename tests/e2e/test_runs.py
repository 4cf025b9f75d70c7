"""Named runs and their results, and a scheduler with real runs."""

import json
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import typer

from jobs.reindex import reindex
from jobs.schedule import Clock, Runner, follow
from pipeline.config_file import load_config
from pipeline.operations.schedule import Schedule
from pipeline.root import layout
from pipeline.root.log import LogEntry, writing
from pipeline.root.manifest import to_bytes
from pipeline.root.result import read_result
from pipeline.root.storage import Storage
from tests.conftest import sentences, write_jsonl

pytestmark = pytest.mark.timeout(300)
NOON = datetime(2100, 1, 1, 12, tzinfo=UTC)
"""Later than any commit of today, which would settle it."""


def config_file(folder, **sections):
    write_jsonl(folder / "corpus" / "a.jsonl", sentences(40))
    sections = {"root": f"{folder}/root", "corpus": {"uri": f"{folder}/corpus"}, "index": {"kind": "flat"}} | sections
    (folder / "c.yaml").write_text(json.dumps(sections))
    return folder / "c.yaml"


def end_of(file, *overrides, name):
    """Exit code of a named run in this process, and its result."""
    code = 0
    try:
        reindex(str(file), list(overrides), name=name, quiet=True)
    except typer.Exit as error:
        code = error.exit_code
    return code, read_result(Storage(load_config(file).root), name)


@pytest.mark.usefixtures("local_ray")
def test_every_end_of_a_run_is_in_its_result(tmp_path, capsys):
    file = config_file(tmp_path, compute={"lease_ttl_s": 1.0})
    code, result = end_of(file, name="first")
    assert (code, result.exit_code, result.error, result.committed) == (0, 0, None, True)
    assert (result.counts["encoded"], result.counts["documents"]) == (40, 40)
    assert (tmp_path / "root" / layout.artifact(result.artifact)).is_dir()
    assert result.started < result.ended

    assert end_of(file, "index.kind=ivfpq", name="first")[0] == 2
    assert "this run has ended; choose another --run" in capsys.readouterr().err
    code, again = end_of(file, name="again")
    assert (code, again.committed, again.artifact, again.counts["encoded"]) == (0, False, result.artifact, 0)

    for name, override, expected, error in (
        ("data", "corpus.text=body", 3, "40 of 40 rows rejected"),
        ("config", "corpus.uri=nowhere", 2, "nowhere: no input files there"),
    ):
        code, result = end_of(file, override, name=name)
        assert (code, result.exit_code, error in result.error, "\n" in result.error) == (expected, expected, True, False)
    with writing(Storage(f"{tmp_path}/root"), "holder", 1.0):
        code, result = end_of(file, name="locked")
    assert (code, result.exit_code, "another run is writing" in result.error) == (4, 4, True)


@pytest.mark.usefixtures("local_ray")
def test_a_bug_is_exit_1_with_its_text_and_a_root_that_takes_no_result_hides_nothing(tmp_path, monkeypatch):
    file = config_file(tmp_path)
    monkeypatch.setattr("pipeline.run.cover", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        end_of(file, name="bug")
    result = read_result(Storage(f"{tmp_path}/root"), "bug")
    assert (result.exit_code, result.error) == (1, "division by zero")
    monkeypatch.setattr("pipeline.run.ingest", lambda *_: 1 / 0)
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "runs").write_text("a file where a folder should be")
    with pytest.raises(ZeroDivisionError):
        reindex(str(file), [f"root={tmp_path}/blocked"], quiet=True)


@pytest.mark.usefixtures("ray_for_programs")
def test_the_second_tick_finds_nothing_to_do_and_says_so(tmp_path, capfd):
    file = config_file(tmp_path)
    told, times = [], iter([NOON, NOON, NOON, NOON + timedelta(hours=1), NOON + timedelta(hours=1)])
    runner = Runner(load_config(file), ["reindex", "-c", str(file)], lambda event, text, **fields: told.append((event, fields)))
    with pytest.raises(StopIteration):
        follow(Schedule("0 * * * *"), runner, Clock(lambda: next(times), lambda _: None))
    runs = [fields["run"] for event, fields in told if event == "ended" and fields["exit_code"] == 0]
    assert len(runs) == 2, told
    first, second = (read_result(Storage(f"{tmp_path}/root"), run) for run in runs)
    assert (first.committed, first.counts["encoded"]) == (True, 40)
    assert (second.committed, second.counts["encoded"], second.artifact) == (False, 0, first.artifact)
    assert capfd.readouterr().err.splitlines()[-1] == (
        f"publish: nothing new: artifact {first.artifact} is live and holds this corpus"
    )


def test_a_signal_goes_to_the_run_and_its_end_is_waited_for(tmp_path):
    file = config_file(tmp_path, compute={"lease_ttl_s": 100.0})
    storage = Storage(f"{tmp_path}/root")
    entry = {"number": 0, "kind": "acquire", "epoch": 0, "holder": "test", "run": "test", "at": "2026-11-24T00:00:00+00:00"}
    storage.create(layout.log_entry(0), to_bytes(LogEntry(**entry)))
    command = [sys.executable, "-m", "jobs", "schedule", "-c", str(file), "--cron", "0 * * * *", "--tz", "Asia/Kolkata"]
    home = Path(__file__).parent.parent.parent
    scheduler = subprocess.Popen(command, cwd=home, stderr=subprocess.PIPE, text=True)
    for line in scheduler.stderr:
        if "watching" in line:
            break
    scheduler.send_signal(signal.SIGTERM)
    rest = scheduler.stderr.read()
    assert scheduler.wait(60) == 143
    assert rest.count("vecmill: stopped") == 2
    (run,) = (path.parent.name for path in (tmp_path / "root" / "runs").glob("*/result.json"))
    result = read_result(storage, run)
    assert (result.exit_code, result.error, run.endswith("30Z-1")) == (143, "stopped by a signal", True)
