"""The command line as a user has it: its output, its exit codes, its signals."""

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.root import layout
from pipeline.root.log import LogEntry
from pipeline.root.manifest import to_bytes
from pipeline.root.storage import Storage
from tests.conftest import sentences, write_jsonl

VECMILL = Path(sys.executable).parent / "vecmill"


def vecmill(*arguments: Any, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [str(VECMILL), *(str(argument) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, **options)
    assert not check or done.returncode == 0, done.stderr + done.stdout
    return done


def result_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The last line of a stream of events."""
    *events, result = [json.loads(line) for line in done.stdout.splitlines()]
    assert {event["event"] for event in events} == {"stage"}
    assert result.pop("event") == "result"
    assert {event["run"] for event in events} == {result["run"]}
    return result


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """A root made by the command itself, with a Ray of its own."""
    folder = tmp_path_factory.mktemp("cli")
    write_jsonl(folder / "a.jsonl", sentences(300))
    file = folder / "c.yaml"
    file.write_text(f"root: {folder}/root\ncorpus: {{uri: {folder}/a.jsonl}}\n")
    done = vecmill("reindex", "-c", file, "--json")
    result = result_of(done)
    assert (result["encoded"], result["committed"], result["live"]["recall"]["mean"]) == (300, True, 1.0)
    told = [json.loads(line) for line in done.stdout.splitlines()[:-1]]
    assert [event["stage"] for event in told if event["ended"]] == ["ingest", "embed", "train", "add", "merge", "evaluate"]
    assert told[0].keys() >= {"event", "run", "at", "stage", "message", "done", "total", "counts", "elapsed_s", "rate", "eta_s"}
    stages = [line.partition(":")[0] for line in done.stderr.splitlines()]
    assert stages == ["ingest", "embed", "train", "add", "merge", "evaluate", "drift", "publish"], done.stderr
    assert "\x1b" not in done.stderr + done.stdout
    return file


def test_search_prints_a_table_or_json(indexed):
    text = sentences(300)[123]["text"]
    table = vecmill("search", "-c", indexed, text, "-k", 2).stdout.splitlines()
    assert table[0].split() == ["rank", "score", "document", "text", "source"]
    assert table[1].split()[:3] == ["1", "1.000", "d123"] or table[1].split()[2] == "d123"
    assert len(table) == 3
    found = json.loads(vecmill("search", "-c", indexed, text, "--json", "--set", "search.k=4").stdout)
    assert (found["hits"][0]["doc_id"], len(found["hits"])) == ("d123", 4)
    artifact = next((indexed.parent / "root" / "artifacts").iterdir())
    assert json.loads(vecmill("search", "--artifact", artifact, text, "--json").stdout)["hits"][0]["doc_id"] == "d123"


def test_search_chooses_among_the_measured_settings(indexed):
    for option, value in (("--recall", "0.9"), ("--latency", "500ms"), ("--latency", "0.5s")):
        found = json.loads(vecmill("search", "-c", indexed, "a note on the harbour", "--json", option, value).stdout)
        assert len(found["hits"]) == 10
    for value, message in (("0.0000001ms", "the fastest measured setting takes"), ("soon", "expected a time such as 2ms")):
        refused = vecmill("search", "-c", indexed, "a note", "--latency", value, check=False)
        assert (refused.returncode, message in refused.stderr) == (2, True)


def test_python_dash_m_jobs_is_the_same_program(indexed):
    done = subprocess.run(
        [sys.executable, "-m", "jobs", "verify", "-c", str(indexed)], capture_output=True, text=True, check=True
    )
    assert "6 files" in done.stdout


@pytest.mark.usefixtures("ray_for_programs")
def test_status_verify_and_second_reindex(indexed):
    status = json.loads(vecmill("status", "-c", indexed, "--json").stdout)
    assert status["next"] == {"files": 1, "ignored_files": 0, "units": 1, "units_to_ingest": 0}
    assert status["writer"] is None
    assert status["live"] == status["artifacts"][0]["artifact"] == status["commits"][0]["artifact"]
    shown = vecmill("status", "-c", indexed).stdout
    assert "units changed or new" in shown
    assert f"{status['runs'][0]['run']} finished, last sign of life" in shown
    assert (status["runs"][0]["run"], status["runs"][0]["state"]) == (status["commits"][0]["run"], "finished")
    assert json.loads(vecmill("verify", "-c", indexed, "--json").stdout)["ok"]
    again = vecmill("reindex", "-c", indexed, "--json", "-q")
    assert again.stderr == ""
    result = result_of(again)
    assert (result["encoded"], result["trained"], result["index_shards"], result["committed"]) == (0, False, 0, False)


def test_report_is_written_as_a_page(indexed, tmp_path):
    shown = vecmill("report", "-c", indexed, "--html", tmp_path / "report.html").stdout
    assert "recall@10" in shown
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    refused = vecmill("report", "-c", indexed, "--html", tmp_path / "none" / "report.html", check=False)
    assert (refused.returncode, "cannot be written" in refused.stderr) == (1, True)


def test_plan_writes_nothing_and_is_right(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [*sentences(50), {"id": "bad", "text": ""}])
    file = tmp_path / "c.yaml"
    file.write_text(f"root: {tmp_path}/root\ncorpus: {{uri: {tmp_path}/a.jsonl}}\n")
    plan = json.loads(vecmill("plan", "-c", file, "--json").stdout)
    assert (plan["files"], plan["documents"], plan["passages"], plan["units_done"]) == (1, 50, 50, 0)
    assert (plan["index"]["kind"], plan["sampled_rejected"], plan["embedding_bytes"]) == ("flat", 1, 50 * (768 + 16))
    assert plan["tokens_per_s"] > 0
    shown = vecmill("plan", "-c", file, "--cluster", "2xL4").stdout
    assert "flat" in shown
    assert "estimate for 2xL4" in shown
    assert "cores for each L4" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "c.yaml"]


@pytest.mark.usefixtures("ray_for_programs")
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["reindex", "-c", "none.yaml"], 2, "none.yaml: no such config file"),
        (["reindex"], 2, "Missing option"),
        (["search", "hello"], 2, "give -c FILE"),
        (["reindex", "-c", "c.yaml", "--set", "index.knd=flat"], 2, "did you mean kind?"),
        (["reindex", "-c", "c.yaml", "--set", "corpus.uri=nowhere"], 2, "nowhere: no input files there"),
        (["reindex", "-c", "c.yaml", "--set", "index.m=50"], 2, "dim 384 cannot be cut into 50 parts"),
        (["reindex", "-c", "c.yaml", "--set", "corpus.text=body"], 3, "5 of 5 rows rejected"),
        (["search", "-c", "c.yaml", "--set", "root=empty", "hello"], 2, "nothing is live here"),
        (["plan", "-c", "c.yaml", "--cluster", "8xB300"], 2, "'8xB300': expected COUNTxNAME, as in 8xL4,2xA100; names are T4"),
        (["verify", "--artifact", "empty"], 5, "no manifest.json"),
    ],
)
def test_exit_codes_and_one_line_errors(tmp_path, arguments, code, message):
    write_jsonl(tmp_path / "a.jsonl", sentences(5))
    (tmp_path / "c.yaml").write_text("root: root\ncorpus: {uri: a.jsonl, max_bad_rows: 0}\n")
    done = vecmill(*arguments, check=False, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("ray_for_programs")
def test_locked_root_exits_4_naming_the_holder(indexed):
    storage = Storage(str(indexed.parent / "root"))
    number = len(list((indexed.parent / "root" / "log").iterdir()))
    entry = LogEntry(number=number, kind="acquire", epoch=number, holder="ana@box pid 7", run="r", at="2026-01-01T00:00:00")
    storage.create(layout.log_entry(number), to_bytes(entry))
    process = subprocess.Popen([str(VECMILL), "reindex", "-c", str(indexed)], stderr=subprocess.PIPE, text=True)
    sequence = 0
    while process.poll() is None:
        storage.put(layout.beat(number, sequence), b"beat")
        sequence += 1
        time.sleep(0.5)
    assert process.returncode == 4
    assert "another run is writing: ana@box pid 7, run r, since 2026-01-01" in process.stderr.read()
    storage.create(layout.log_entry(number + 1), to_bytes(entry.model_copy(update={"number": number + 1, "kind": "release"})))


@pytest.mark.usefixtures("ray_for_programs")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_release_the_root_and_say_how_to_resume(tmp_path, number, code):
    write_jsonl(tmp_path / "a.jsonl", sentences(3000))
    file = tmp_path / "c.yaml"
    file.write_text(f"root: {tmp_path}/root\ncorpus: {{uri: {tmp_path}/a.jsonl}}\n")
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a suite run in the background inherits SIGINT ignored
    run = [str(VECMILL), "reindex", "-c", str(file)]
    process = subprocess.Popen(run, stderr=subprocess.PIPE, text=True, preexec_fn=heed)  # noqa: PLW1509
    while not (tmp_path / "root" / "passages").is_dir():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "run the same command to resume" in errors
    kinds = [json.loads(path.read_text())["kind"] for path in sorted((tmp_path / "root" / "log").iterdir())]
    assert kinds == ["acquire", "release"]


@pytest.mark.timeout(400)
def test_demo_finds_what_it_promises(tmp_path):
    done = vecmill("demo", "--folder", tmp_path / "demo", "--root", tmp_path / "index", "--limit", 1500, cwd=tmp_path)
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == ["demo.yaml", "docstrings.jsonl"]
    assert (tmp_path / "index" / "artifacts").is_dir()
    assert "parse a date written as text" in done.stdout
    assert "datetime.datetime.strptime" in done.stdout
    assert done.stdout.count("rank") == 5


def test_validate_tells_what_a_run_would_reject_and_exits_3(tmp_path):
    rows = [*sentences(20), *({"id": f"empty{number}", "text": ""} for number in range(11))]
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows)
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps({"root": str(tmp_path / "root"), "corpus": {"uri": str(tmp_path / "corpus")}}))
    done = vecmill("validate", "-c", file, "--json", "--out", tmp_path / "bad.parquet", check=False)
    assert done.returncode == 3
    assert "11 rows rejected, the ceiling is 10" in done.stderr
    found = json.loads(done.stdout)
    assert (found["ok"], found["counts"]["documents"], found["codes"]) == (False, 20, {"E_EMPTY_TEXT": 11})
    assert pq.read_table(tmp_path / "bad.parquet")["source_row"].to_pylist() == list(range(20, 31))
    assert vecmill("validate", "-c", file, "--set", "corpus.max_bad_rows=11").returncode == 0
    done = vecmill("validate", "-c", file, "--out", tmp_path / "none" / "bad.parquet", check=False)
    assert (done.returncode, "bad.parquet: cannot be written" in done.stderr) == (1, True), done.stderr
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows[20:25])
    done = vecmill("validate", "-c", file, check=False)
    assert (done.returncode, "a run would stop, no document in 5 rows" in done.stderr) == (3, True), done.stderr
    assert not (tmp_path / "root").exists()


def test_doctor_and_doctor_storage(tmp_path):
    found = {line["what"]: line["ok"] for line in json.loads(vecmill("doctor", "--json").stdout)}
    assert found["faiss"]
    assert found["python"]
    assert "20 of 20 races" in vecmill("doctor", "storage", tmp_path).stdout
    assert list(tmp_path.iterdir()) == []
