"""Processes of a run killed while it works: the real model under Ray."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.artifacts.audit import audit
from pipeline.artifacts.live import open_live
from pipeline.artifacts.publish import live_artifact
from pipeline.embed.coverage import cover
from pipeline.errors import BadFileError, ProcessError
from pipeline.ingest.snapshot import rejected_rows, snapshot_of
from pipeline.root import layout
from pipeline.root.job import plan_job
from pipeline.root.shards import open_parquet
from pipeline.root.storage import Storage
from pipeline.run import reindex
from pipeline.stages import embed, ingest
from tests.conftest import make_config, sentences, stored_documents, write_jsonl
from tests.e2e.test_reindex import search
from tests.faults.killers import POISON, POISONED_FILE, DeadlyReader, KillsAtPoison, KillsOnce, ingest_row
from tests.faults.sessions import end_session

HOME = Path(__file__).parent.parent.parent
KILL_AFTER = (
    "passages/*.json",
    "embeddings/*/*.json",
    "shards/*/*.json",
    "artifacts/*/vectors.f16",
    "artifacts/*/manifest.json",
)
"""A file of every stage: one more of them, and the driver is killed."""
TTL_S = 1.0


def config_of(folder, **sections):
    return make_config(folder / "root", folder / "corpus", **{"index": {"kind": "flat"}, **sections})


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("local_ray")
def test_an_encoder_that_dies_once_is_started_again(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "corpus" / "a.jsonl", sentences(300))
    monkeypatch.setattr(embed, "EncoderActor", KillsOnce)
    config = config_of(tmp_path, compute={"unit_passages": 100})
    outcome = reindex(config)
    assert (tmp_path / "killed").exists() or (tmp_path / "root" / "killed").exists()
    assert (outcome.encoded, outcome.live.counts["passages"], outcome.live.counts["document_rows"]) == (300, 300, 300)
    assert audit(config, 300).passages == 300
    assert search(config, "Note 42 on the glacier and the furnace.", 1)[0].doc_id == "d42"


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("local_ray")
def test_a_document_that_kills_its_process_every_time_is_quarantined(tmp_path, monkeypatch):
    rows = sentences(120)
    rows[70]["text"] += f" A {POISON}."
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows)
    monkeypatch.setattr(embed, "EncoderActor", KillsAtPoison)
    config = config_of(tmp_path, compute={"unit_passages": 60})
    said = []
    outcome = reindex(config, say=said.append)
    counts = outcome.live.counts
    assert (counts["passages"], counts["document_rows"], counts["quarantined_rows"]) == (119, 119, 1)
    assert outcome.committed
    assert sum("is encoded apart" in event.message for event in said) >= 1
    job = plan_job(config, on_gpu=False)
    codes = []
    for record in job.embedding_records():
        if record.rejected:
            with open_parquet(job.embeddings, job.embedding_folder, record.rejected) as parquet:
                codes += parquet.read().to_pylist()
    assert [row["code"] for row in codes] == ["E_CRASH"]
    assert all("alone died 2 times" in row["message"] for row in codes)
    assert len(cover(job, snapshot_of(job.storage, outcome.live)).left_out) == 1
    assert audit(config, 300).passages == 119
    again = reindex(config)
    assert (again.encoded, again.committed) == (0, False)
    assert open_live(config).manifest.version == outcome.live.version


def deadly_config(folder, monkeypatch, **corpus):
    monkeypatch.setattr(ingest, "_ingest_row", ingest_row)
    monkeypatch.setattr(ingest, "UnitReader", DeadlyReader)
    return config_of(folder, corpus=corpus)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("local_ray")
def test_a_document_that_kills_the_process_that_splits_it_is_put_aside(tmp_path, monkeypatch):
    rows = sentences(60)
    rows[41]["text"] += f" A {POISON}."
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows)
    config = deadly_config(tmp_path, monkeypatch)
    outcome = reindex(config)
    counts = outcome.snapshot.counts
    assert (counts["rows"], counts["documents"], counts["rejected"], outcome.encoded) == (60, 59, 1, 59)
    (row,) = rejected_rows(plan_job(config, on_gpu=False).storage, outcome.snapshot, 9)
    assert (row["source_uri"], row["source_row"], row["doc_id"]) == (str(tmp_path / "corpus" / "a.jsonl"), 41, "d41")
    assert (row["code"], POISON in row["text_head"]) == ("E_CRASH", True)
    assert reindex(config).committed is False


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("local_ray")
def test_a_file_that_kills_the_process_that_reads_it_is_named_or_skipped(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "corpus" / "a.jsonl", sentences(10))
    write_jsonl(tmp_path / "corpus" / POISONED_FILE, sentences(5, start=10))
    with pytest.raises(BadFileError, match=rf"^{tmp_path}/corpus/{POISONED_FILE}: E_CRASH, the process that read it died"):
        reindex(deadly_config(tmp_path, monkeypatch))
    outcome = reindex(deadly_config(tmp_path, monkeypatch, on_error="skip_file"))
    assert (outcome.live.counts["documents"], outcome.snapshot.counts["skipped_files"]) == (10, 1)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("local_ray")
def test_documents_that_all_kill_their_process_end_the_run_in_one_line(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "corpus" / "a.jsonl", [{"id": str(number), "text": f"{POISON} {number}"} for number in range(6)])
    with pytest.raises(ProcessError, match=r"^processes of the run died of more than 1 documents; look for") as error:
        reindex(deadly_config(tmp_path, monkeypatch, max_bad_rows=1))
    assert error.value.exit_code == 1


def drive(config_file, log):
    command = [sys.executable, "-m", "jobs", "reindex", "-c", str(config_file), "--json"]
    return subprocess.Popen(command, cwd=HOME, stdout=subprocess.PIPE, stderr=log, start_new_session=True)


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("local_ray")
def test_a_driver_killed_in_every_stage_is_taken_over_by_the_same_command(tmp_path):
    for number in range(3):
        write_jsonl(tmp_path / "corpus" / f"{number}.jsonl", sentences(120, start=120 * number))
    settings = {
        "encoder": {"precision": "fp32"},
        "index": {"kind": "ivfpq", "nlist": 8, "m": 32},
        "search": {"nprobe": 8, "rescore": 50},
        "compute": {"lease_ttl_s": TTL_S, "unit_passages": 60},
    }
    root = tmp_path / "root"
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps({"root": str(root), "corpus": {"uri": str(tmp_path / "corpus")}, **settings}))
    seen: dict[Path, bytes] = {}
    with (tmp_path / "log").open("wb") as log:
        for pattern in KILL_AFTER:
            before = len(list(root.glob(pattern)))
            process = drive(file, log)
            try:
                while len(list(root.glob(pattern))) == before:
                    assert process.poll() is None, f"{pattern}: it ended with {process.returncode} before it could be killed"
                    time.sleep(0.002)
            finally:
                end_session(process)
            for path, data in seen.items():
                assert path.read_bytes() == data, f"{path} was done before and is done again"
            seen = {path: path.read_bytes() for path in root.rglob("*.json") if path.parent.parent.name != "beats"}
        is_live = live_artifact(Storage(str(root))) is not None  # where the last kill came late
        process = drive(file, log)
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    taken_over = json.loads(output.splitlines()[-1])
    assert (taken_over["encoded"], taken_over["committed"]) == (0, not is_live)
    calm = reindex(make_config(tmp_path / "calm", tmp_path / "corpus", **settings))
    assert taken_over["counts"] == calm.snapshot.counts
    versions = {"root": taken_over["live"]["artifact"], "calm": calm.live.version}
    folders = [tmp_path / name / layout.artifact(version) for name, version in versions.items()]
    tables = [stored_documents(folder) for folder in folders]
    assert tables[0].equals(tables[1])
    vectors = [np.fromfile(folder / "vectors.f16", dtype="<f2").reshape(360, -1).astype(np.float32) for folder in folders]
    np.testing.assert_allclose(vectors[0], vectors[1], atol=5e-4)  # other batches, other sums; float16 has steps of 1e-4
    assert folders[0].joinpath("index.faiss").stat().st_size == folders[1].joinpath("index.faiss").stat().st_size
