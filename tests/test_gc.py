"""What upkeep needs of a root, and what it leaves: whole runs without Ray, over a corpus that changes."""

import os
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline.artifacts.artifact import verify
from pipeline.artifacts.audit import audit
from pipeline.artifacts.publish import commit, live_artifact
from pipeline.errors import LockedError, StorageError, VerificationError
from pipeline.operations import upkeep
from pipeline.operations.erasure import purge
from pipeline.root import layout
from pipeline.root.job import scratch
from pipeline.root.log import unlock, writing
from pipeline.root.manifest import list_records, load, to_bytes
from pipeline.root.result import RunResult, remembered, scheduled_name, write_result
from pipeline.root.storage import Storage
from pipeline.run import reindex
from pipeline.stages import index
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
    now = datetime.now(UTC)
    settled = remembered(storage, now)
    purge(config, ["1"])
    assert live_artifact(storage) == live
    assert audit(config, 50).passages == 50
    assert remembered(storage, now) == settled == {layout.run(name, "result.json")}
    ended = load(RunResult, storage, layout.run(name, "result.json"))
    assert (ended.exit_code, ended.error) == (3, None)


@pytest.mark.parametrize("what", ["gc", "compact", "purge"])
def test_who_has_lost_the_root_deletes_no_more(tmp_path, monkeypatch, what):
    config, rows = nights(tmp_path, count=3)
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows[1:])
    reindex(config)
    monkeypatch.setattr("pipeline.root.log.CHECK_S", 0.0)
    delete, create, deleted, lost = Storage.delete, Storage.create, [], []

    def lose():
        if not lost:
            unlock(Storage(config.root))
            lost.append(True)

    def counted(storage, path):
        deleted.append(path)
        delete(storage, path)
        if what == "gc":
            lose()

    def created(storage, path, data):
        made = create(storage, path, data)
        if storage.uri.endswith("/embeddings"):  # the shard that is to replace others is there
            lose()
        return made

    monkeypatch.setattr(Storage, "delete", counted)
    monkeypatch.setattr(Storage, "create", created)
    with pytest.raises(LockedError, match="lost the root to a writer that has ended since"):
        if what == "purge":
            purge(config, ["d0"])
        else:
            upkeep.collect(config, 4, -1.0, compact=True) if what == "compact" else upkeep.collect(config, 1, -1.0)
    assert lost
    assert len([path for path in deleted if not path.startswith(layout.BEATS)]) == (1 if what == "gc" else 0)


def test_purge_takes_what_is_dated_later(tmp_path):
    rows = [*sentences(50), {"id": "gone", "text": "The patient was seen on a Tuesday."}]
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows)
    config = config_of(tmp_path)
    reindex(config)
    year_on = time.time() + 365 * 86400
    for path in files_below(tmp_path / "root"):
        os.utime(path, (year_on, year_on))
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows[:50])
    reindex(config)
    assert purge(config, ["gone"]).vectors == 1


def test_a_shard_that_another_root_wrote_meanwhile_is_no_error(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "corpus" / "a.jsonl", sentences(300))
    config = config_of(tmp_path, store={"embeddings": str(tmp_path / "shared")})
    add, shared = index.add, Storage(str(tmp_path / "shared"))

    def late(*arguments):
        added = add(*arguments)
        (encoder,) = shared.list("")
        (record,) = list_records(shared, encoder.strip("/")).values()
        shared.put(f"{encoder.strip('/')}/00.json", to_bytes(record.model_copy(update={"unit": "00"})))
        return added

    monkeypatch.setattr(index, "add", late)
    assert reindex(config).live.counts["duplicate_vectors"] == 0
    assert audit(config, 300).passages == 300


def test_a_disk_that_fills_under_the_words_is_one_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.search.lexical.os.posix_fallocate", full, raising=False)
    write_jsonl(tmp_path / "corpus" / "a.jsonl", sentences(20))
    with pytest.raises(StorageError, match=r"cannot write files in the making, .*No space left"):
        reindex(config_of(tmp_path, index={"kind": "flat", "lexical": True}))


def test_gc_counts_from_its_own_entry_whatever_is_dated_later(tmp_path):
    config, _ = nights(tmp_path, count=2)
    year_on = time.time() + 365 * 86400
    os.utime(tmp_path / "root" / "log" / "000000000000.json", (year_on, year_on))
    assert upkeep.collect(config, 1, 86400.0).files.keys() <= {layout.BEATS}


def test_scratch_of_a_killed_process_goes_and_of_a_living_one_stays(tmp_path):
    with scratch(str(tmp_path)) as killed, scratch(str(tmp_path)) as living, scratch(str(tmp_path)) as young:
        for folder in (killed, living, young):
            (folder / "vectors").write_bytes(b"x")
        (killed / ".alive").unlink()  # and so its lock
        for folder in (killed, living):
            os.utime(folder, (time.time() - 3600, time.time() - 3600))
        (young / ".alive").unlink()
        with scratch(str(tmp_path)) as new:
            assert {path.name for path in tmp_path.iterdir()} == {living.name, young.name, new.name}
        assert (living / "vectors").read_bytes() == b"x"
        killed.mkdir()
    assert list(tmp_path.iterdir()) == []
