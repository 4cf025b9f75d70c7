"""Shards written anew, documents erased: what is needed stays, what must go is gone from every byte."""

import shutil

import pyarrow.parquet as pq
import pytest

from pipeline.artifacts.audit import audit
from pipeline.artifacts.publish import live_artifact
from pipeline.errors import ConfigError, StorageError, VerificationError
from pipeline.operations import upkeep
from pipeline.operations.compaction import SMALL_ROWS
from pipeline.operations.erasure import purge
from pipeline.root import layout
from pipeline.root.job import plan_job
from pipeline.root.manifest import list_records
from pipeline.root.shards import read_columns
from pipeline.root.storage import Storage
from pipeline.run import reindex
from tests.conftest import make_config, sentences, write_jsonl
from tests.faults.alone import alone as alone  # a fixture
from tests.faults.test_crash_points import Killed, Writes

pytestmark = pytest.mark.usefixtures("alone")

SECRET = "The patient Ottoline Quillfeather was seen on a Tuesday."


INDEX = {"kind": "ivfpq", "nlist": 8, "m": 32}
QUICK = {"search": {"nprobe": 8, "rescore": 10}, "evaluation": {"sample": 20}}
"""Of hundreds of runs none needs to know how good its index is."""


def config_of(folder, **sections):
    return make_config(folder / "root", folder / "corpus", **({"index": INDEX} | QUICK | sections))


def shards_of(config):
    job = plan_job(config, on_gpu=False)
    (trained,) = Storage(config.root).list("shards")
    return job.embedding_records(), list_records(job.storage, trained)


def nights(folder, count=4, documents=300):
    """A root after some nights that each changed a few documents."""
    rows = sentences(documents)
    for night in range(count):
        for row in rows[10 * night : 10 * night + 10]:
            row["text"] += f" Revised in night {night}."
        write_jsonl(folder / "corpus" / "a.jsonl", rows)
        reindex(config_of(folder))
    return config_of(folder), rows


def test_compaction_makes_one_shard_of_many_and_changes_no_answer(tmp_path):
    config, rows = nights(tmp_path)
    before, codes = shards_of(config)
    live = live_artifact(Storage(config.root))
    assert len(before) == len(codes) == 4
    planned = upkeep.collect(config, 1, -1.0, compact=True, dry_run=True)
    assert (planned.shards_before, planned.shards_after) == (4, 1)
    assert len(shards_of(config)[0]) == 4
    done = upkeep.collect(config, 1, -1.0, compact=True)
    assert (done.shards_before, done.shards_after) == (4, 1)
    (record,), after = shards_of(config)
    assert list(after) == [record.unit]
    assert record.files[0].rows == live.counts["passages"] == 300
    assert audit(config, 300).other_codes == 0
    again = reindex(config)
    assert (again.encoded, again.built, again.live) == (0, None, live)
    assert upkeep.collect(config, 1, -1.0, compact=True).shards_before == 0

    rows[0]["text"] += " And again."
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows)
    next_night = reindex(config)
    assert (next_night.encoded, next_night.index_shards, next_night.trained) == (1, 1, False)
    assert audit(config, 300).passages == 300


def test_compaction_leaves_what_is_large_alive_or_young(tmp_path, monkeypatch):
    config, _ = nights(tmp_path)
    assert upkeep.collect(config, 1, 3600.0, compact=True).shards_before == 0
    monkeypatch.setattr("pipeline.operations.compaction.SMALL_ROWS", 100)
    found = upkeep.collect(config, 1, -1.0, compact=True)
    records, _ = shards_of(config)
    assert (found.shards_before, found.shards_after, len(records)) == (3, 1, 2)
    assert max(record.files[0].rows for record in records) == 300  # the first night's: 30 of its rows are dead
    assert SMALL_ROWS == 2048


def test_a_shared_embedding_store_is_not_compacted(tmp_path):
    config = config_of(tmp_path, store={"embeddings": str(tmp_path / "shared")})
    with pytest.raises(ConfigError, match="is shared with other roots"):
        upkeep.collect(config, 1, -1.0, compact=True)


def test_compaction_killed_at_any_write_or_delete_leaves_a_root_that_works(tmp_path, monkeypatch):
    _, rows = nights(tmp_path, count=3)
    config = config_of(tmp_path, compute={"lease_ttl_s": 0.1})
    shutil.copytree(tmp_path / "root", tmp_path / "untouched")
    for fatal in range(100):
        shutil.rmtree(tmp_path / "root")
        shutil.copytree(tmp_path / "untouched", tmp_path / "root")
        with monkeypatch.context() as patch:
            count_changes(patch, fatal)
            try:
                upkeep.collect(config, 1, -1.0, compact=True)
            except (Killed, StorageError):
                pass
            else:
                break
        rows[50]["text"] += " And again."
        write_jsonl(tmp_path / "corpus" / "a.jsonl", rows)
        assert reindex(config).encoded == 1
        assert audit(config, 300).passages == 300
        upkeep.collect(config, 1, -1.0, compact=True)
        assert len(shards_of(config)[0]) == 1
        assert audit(config, 300).passages == 300
    assert fatal > 8


def everything_below(root):
    """Every byte below a folder, with the columns of its Parquet files taken out of their compression."""
    found = b""
    for file in root.rglob("*"):
        if file.is_file():
            found += file.read_bytes()
            if file.suffix == ".parquet":
                found += repr(pq.read_table(file).to_pydict()).encode()
    return found


def vectors_below(config):
    """Every stored vector, as bytes."""
    job = plan_job(config, on_gpu=False)
    tables = [
        read_columns(job.embeddings, job.embedding_folder, record.files[0], ["embedding"]) for record in job.embedding_records()
    ]
    return {vector for table in tables for vector in table["embedding"].to_pylist()}


def test_purge_erases_a_document_of_a_full_export(tmp_path):
    rows = [*sentences(50), {"id": "patient-7", "text": SECRET}, {"id": "other", "text": sentences(1)[0]["text"]}]
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows)
    config = config_of(tmp_path)
    first = reindex(config)
    with pytest.raises(ConfigError, match=r"'patient-7' of .*a\.jsonl is in the corpus"):
        purge(config, ["patient-7"])
    assert b"Quillfeather" in everything_below(tmp_path / "root")
    before = vectors_below(config)
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows[:50])
    second = reindex(config)
    assert b"Quillfeather" in everything_below(tmp_path / "root")
    done = purge(config, ["patient-7", "other"])
    assert (done.vectors, done.passages) == (1, 0)  # its unit went with its snapshot; "other" shares its text with d0
    assert done.searched == 4  # an ingest unit and who its documents are, the embeddings, the artifact's documents
    left = everything_below(tmp_path / "root")
    assert b"Quillfeather" not in left and b"patient-7" not in left and b"'other'" not in left
    (gone,) = before - vectors_below(config)
    assert gone not in left
    assert not any((tmp_path / "root" / layout.artifact(first.live.version)).iterdir())
    assert live_artifact(Storage(config.root)) == second.live
    assert audit(config, 50).passages == 50
    assert reindex(config).built is None
    assert purge(config, ["patient-7"]).vectors == 0


@pytest.mark.parametrize("mode", ["full", "append"])
def test_purge_erases_what_deletes_only_hide(tmp_path, mode):
    rows = [*sentences(50), {"id": "patient-7", "text": SECRET}, {"id": "patient-7", "text": SECRET}, {"id": "p8", "text": ""}]
    write_jsonl(tmp_path / "corpus" / "a.jsonl", [*rows[:20], *rows[50:], *rows[20:50]])
    write_jsonl(tmp_path / "gone.jsonl", [{"id": "d3"}])
    config = config_of(tmp_path, corpus={"mode": mode, "deletes": str(tmp_path / "gone.jsonl")})
    reindex(config)
    write_jsonl(tmp_path / "gone.jsonl", [{"id": "d3"}, {"id": "patient-7"}])
    live = reindex(config).live
    assert b"Quillfeather" in everything_below(tmp_path / "root")
    done = purge(config, ["patient-7", "p8"])
    assert (done.passages, done.rejected, done.vectors) == (2, 1, 1)
    left = everything_below(tmp_path / "root")
    assert b"Quillfeather" not in left and b"patient-7" not in left and b"p8" not in left
    again = reindex(config)
    assert (again.built, again.live) == (None, live)
    counts = again.snapshot.counts
    assert (counts["rows"], counts["documents"], counts["deleted"], counts["rejected"]) == (50, 49, 1, 0)
    assert audit(config, 50).passages == 49
    write_jsonl(tmp_path / "corpus" / "b.jsonl", sentences(5, 100))
    grown = reindex(config)
    assert (grown.encoded, grown.live.counts["documents"], grown.committed) == (5, 54, True)


def count_changes(patch, fatal):
    """Writes and deletes are counted together; the one numbered ``fatal`` ends in the given way."""
    delete = Storage.delete
    writes = Writes(patch, fatal)
    counted = writes._counted(lambda storage, path, _: delete(storage, path))
    patch.setattr(Storage, "delete", lambda storage, path: counted(storage, path, b""))


def test_purge_killed_at_any_write_or_delete_is_finished_by_the_same_command(tmp_path, monkeypatch):
    rows = [*sentences(40), {"id": "patient-7", "text": SECRET}, {"id": "p8", "text": ""}]
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows)
    write_jsonl(tmp_path / "gone.jsonl", [{"id": "d3"}])
    deletes = {"deletes": str(tmp_path / "gone.jsonl")}
    reindex(config_of(tmp_path, corpus=deletes))
    write_jsonl(tmp_path / "gone.jsonl", [{"id": "d3"}, {"id": "patient-7"}])
    config = config_of(tmp_path, corpus=deletes, compute={"lease_ttl_s": 0.1})
    live = reindex(config).live
    shutil.copytree(tmp_path / "root", tmp_path / "untouched")
    for fatal in range(200):
        shutil.rmtree(tmp_path / "root")
        shutil.copytree(tmp_path / "untouched", tmp_path / "root")
        with monkeypatch.context() as patch:
            count_changes(patch, fatal)
            try:
                purge(config, ["patient-7", "p8"])
            except (Killed, StorageError):
                pass
            else:
                break
        assert audit(config, 40).passages == 39, "what is live is whole at any moment"
        purge(config, ["patient-7", "p8"])
        left = everything_below(tmp_path / "root")
        assert b"Quillfeather" not in left and b"patient-7" not in left and b"p8" not in left, fatal
        again = reindex(config)
        assert (again.encoded, again.live.content) == (0, live.content), fatal
        counts = again.snapshot.counts
        assert (counts["rows"], counts["documents"], counts["deleted"], counts["rejected"]) == (40, 39, 1, 0), fatal
        assert audit(config, 40).passages == 39
    assert fatal > 10


@pytest.mark.parametrize(
    ("step", "left"),
    [
        ("pipeline.operations.erasure._erase_vectors", r"embeddings/.*\.parquet"),
        ("pipeline.operations.erasure.upkeep.collect_held", r"artifacts/.*/documents\.arrow"),
    ],
)
def test_purge_that_leaves_something_says_so(tmp_path, monkeypatch, step, left):
    rows = [*sentences(20), {"id": "patient-7", "text": SECRET}]
    config = config_of(tmp_path)
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows)
    reindex(config)
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows[:20])
    reindex(config)
    nothing = {"_erase_vectors": lambda *_: 0, "collect_held": lambda *_, **__: upkeep.Collected(kept=())}
    monkeypatch.setattr(step, nothing[step.rpartition(".")[2]])
    with pytest.raises(VerificationError, match=rf"{left}: still has something of the documents"):
        purge(config, ["patient-7"])
