"""What upkeep needs of a root, and what it leaves: whole runs without Ray, over a corpus that changes."""

import os
import time
from pathlib import Path

import pytest

from pipeline.artifacts.artifact import verify
from pipeline.artifacts.audit import audit
from pipeline.artifacts.publish import commit, live_artifact
from pipeline.errors import VerificationError
from pipeline.operations import upkeep
from pipeline.operations.erasure import purge
from pipeline.root import layout
from pipeline.root.log import writing
from pipeline.root.manifest import list_records, load, to_bytes
from pipeline.root.result import RunResult, remembered, scheduled_name, write_result
from pipeline.root.storage import Storage
from pipeline.run import reindex
from tests.conftest import sentences, write_jsonl
from tests.faults.alone import alone as alone  # a fixture
from tests.test_compaction import config_of, nights

pytestmark = pytest.mark.usefixtures("alone")


def files_below(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*") if path.is_file()}


def test_gc_keeps_what_is_left_of_as_many_as_are_asked_for(tmp_path):
    config, _ = nights(tmp_path, count=3)
    live = live_artifact(Storage(config.root))
    assert len(upkeep.collect(config, 2, -1.0).kept) == 2
    assert upkeep.collect(config, 1, -1.0).kept == (live.version,)
    assert upkeep.collect(config, 3, -1.0).kept == (live.version,)
    assert audit(config, 300).passages == 300


def test_gc_keeps_the_index_shards_of_embeddings_that_are_elsewhere(tmp_path):
    shared = {"store": {"embeddings": str(tmp_path / "shared")}}
    rows = sentences(300)
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows)
    config = config_of(tmp_path, **shared)
    reindex(config)
    before = files_below(tmp_path / "root" / "shards") | files_below(tmp_path / "shared")
    assert len(before) == 4  # a shard, its codes, their records
    assert "shards" not in upkeep.collect(config, 1, -1.0).files
    assert files_below(tmp_path / "root" / "shards") | files_below(tmp_path / "shared") == before
    rows[0]["text"] += " Revised."
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows)
    assert reindex(config).index_shards == 1


def test_a_dry_run_tells_what_goes(tmp_path):
    config, rows = nights(tmp_path, count=3)
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows[40:])
    reindex(config)
    told = upkeep.collect(config, 1, -1.0, compact=True, dry_run=True)
    done = upkeep.collect(config, 1, -1.0, compact=True)
    assert told.files == {folder: count for folder, count in done.files.items() if folder != layout.BEATS}
    assert (told.shards_before, told.shards_after) == (done.shards_before, done.shards_after)
    assert told.files[layout.EMBEDDINGS] == 4, "the second and third night's shards have nothing live in them"


def test_a_dry_run_over_a_root_that_was_idle_counts_from_now(tmp_path):
    config, _ = nights(tmp_path, count=2)
    month_ago = time.time() - 30 * 86400
    for path in files_below(config.root):
        os.utime(path, (month_ago, month_ago))
    assert upkeep.collect(config, 1, 86400.0, dry_run=True).files["artifacts"] > 3


def test_rollback_refuses_a_manifest_that_is_not_the_commits(tmp_path):
    config, _ = nights(tmp_path, count=2)
    first, _ = sorted((tmp_path / "root" / "artifacts").iterdir())
    other = verify(Storage(config.root), f"artifacts/{first.name}").model_copy(update={"verdict": "another"}).sealed()
    (first / "manifest.json").write_bytes(to_bytes(other))
    with pytest.raises(VerificationError, match=r"its bytes are not those of commit"):
        upkeep.rollback(config, None)


def test_vectors_that_two_shards_have_are_counted_and_no_others(tmp_path):
    config, rows = nights(tmp_path, count=3)
    storage = Storage(config.root)
    assert live_artifact(storage).counts["duplicate_vectors"] == 0
    (encoder,) = storage.list(layout.EMBEDDINGS)
    first = max(list_records(storage, encoder).values(), key=lambda record: record.files[0].rows)
    storage.put(f"{encoder}/zz.json", to_bytes(first.model_copy(update={"unit": "zz"})))
    rows[299]["text"] += " Revised."
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows)
    assert reindex(config).live.counts["duplicate_vectors"] == 300 - 21  # which have been revised since


def test_gc_keeps_what_a_young_artifact_rests_on(tmp_path):
    rows = sentences(300)
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows)
    reindex(config_of(tmp_path))
    days_ago = time.time() - 3 * 86400
    for path in files_below(tmp_path / "root"):
        os.utime(path, (days_ago, days_ago))
    young = reindex(config_of(tmp_path, index={"kind": "ivfpq", "nlist": 4, "m": 32})).live  # of the same snapshot
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows[20:])
    config = config_of(tmp_path, index={"kind": "ivfpq", "nlist": 4, "m": 32})
    live = reindex(config).live
    assert upkeep.collect(config, 1, 86400.0).kept == (live.version, young.version)
    assert upkeep.collect(config, 2, 86400.0).kept == (live.version, young.version)
    assert upkeep.rollback(config, None).version == young.version
    assert audit(config, 300).passages == 300
    assert upkeep.collect(config, 1, -1.0).kept == (young.version,)


def test_audit_writes_nothing(tmp_path):
    write_jsonl(tmp_path / "corpus" / "a.jsonl", [*sentences(60), {"id": "empty", "text": ""}])
    config = config_of(tmp_path)
    assert reindex(config).live.counts["rejected"] == 1
    before = files_below(config.root)
    assert audit(config, 60).passages == 60
    assert files_below(config.root) == before


@pytest.mark.parametrize("name", ["documents.arrow", "vectors.f16"])
@pytest.mark.parametrize("size", [None, 1001])
def test_audit_names_a_file_that_is_gone_or_cut(tmp_path, name, size):
    config, _ = nights(tmp_path, count=1)
    file = next((tmp_path / "root" / "artifacts").glob(f"*/{name}"))
    file.unlink()
    if size:
        file.write_bytes(bytes(size))
    with pytest.raises(VerificationError, match=rf"{name}: missing or of another size"):
        audit(config, 10)


def test_a_damaged_shard_is_named(tmp_path):
    rows = sentences(60)
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows)
    config = config_of(tmp_path, index={"kind": "flat"})
    reindex(config)
    shard = next((tmp_path / "root" / "embeddings").rglob("*.parquet"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows[1:])
    with pytest.raises(VerificationError, match=rf"{shard.name}: not readable, .*checksum.*; delete it and its record"):
        reindex(config)


def test_a_corpus_that_grows_is_read_whole_after_a_run_with_a_limit(tmp_path):
    write_jsonl(tmp_path / "corpus" / "a.jsonl", sentences(50))
    config = config_of(tmp_path, corpus={"mode": "append"}, index={"kind": "flat"})
    assert reindex(config, limit=10).live.counts["documents"] == 10
    assert reindex(config).live.counts["documents"] == 50
    write_jsonl(tmp_path / "corpus" / "b.jsonl", sentences(5, start=50))
    assert reindex(config).live.counts["documents"] == 55


def test_scratch_is_made_where_it_is_asked_for(tmp_path):
    write_jsonl(tmp_path / "corpus" / "a.jsonl", sentences(20))
    config = config_of(tmp_path, index={"kind": "flat"}, compute={"scratch": str(tmp_path / "new" / "scratch")})
    assert reindex(config).encoded == 20
    assert list((tmp_path / "new" / "scratch").iterdir()) == []


def test_purge_of_a_short_id_leaves_what_runs_measured_and_how_they_ended(tmp_path):
    rows = [*sentences(50), {"id": "1", "text": "The patient was seen on a Tuesday."}]
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows)
    config = config_of(tmp_path)
    reindex(config)
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows[:50])
    live = reindex(config).live
    storage = Storage(config.root)
    with writing(storage, "tuned", 5.0) as lease:
        commit(lease, storage, live, measured_again=True)
    moment = {"started": "2026-11-24T03:00:00+00:00", "ended": "2026-11-24T03:01:00+00:00"}
    name = scheduled_name("abc", RunResult(run="x", exit_code=3, **moment).started, 1)
    assert write_result(storage, RunResult(run=name, exit_code=3, error="a.jsonl row 51: '1' is no id", **moment))
    settled = remembered(storage)
    purge(config, ["1"])
    assert live_artifact(storage) == live
    assert audit(config, 50).passages == 50
    assert remembered(storage) == settled == {layout.run(name, "result.json")}
    ended = load(RunResult, storage, layout.run(name, "result.json"))
    assert (ended.exit_code, ended.error) == (3, None)
