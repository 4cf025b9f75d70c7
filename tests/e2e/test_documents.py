"""Which documents are live: duplicates, deletes, corpora that only grow, exports that shrank; rollback, gc, unlock."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.artifacts.artifact import verify
from pipeline.artifacts.audit import audit
from pipeline.artifacts.export import export
from pipeline.artifacts.live import open_live
from pipeline.errors import ConfigError, DataError, LockedError
from pipeline.ingest.snapshot import rejected_rows
from pipeline.operations import upkeep
from pipeline.root import layout
from pipeline.root.log import Log, unlock, writing
from pipeline.root.manifest import SnapshotManifest, load
from pipeline.root.storage import Storage
from pipeline.run import reindex
from tests.conftest import make_config, sentences, stored_documents, write_jsonl

pytestmark = pytest.mark.usefixtures("local_ray")


def config_of(folder, **sections):
    return make_config(folder / "root", folder / "corpus", **sections)


def live_texts(config):
    """doc_id -> texts of the live artifact."""
    folder = Path(config.root) / layout.artifact(open_live(config).manifest.version)
    rows = stored_documents(folder).select(["doc_id", "text"]).to_pylist()
    found = {}
    for row in rows:
        found.setdefault(row["doc_id"], []).append(row["text"])
    return found


def test_same_text_counts_once_other_texts_reject_the_id(tmp_path):
    rows = sentences(60)
    write_jsonl(tmp_path / "corpus" / "a.jsonl", [*rows, rows[3]])
    write_jsonl(
        tmp_path / "corpus" / "b.jsonl", [rows[5], {"id": "d7", "text": "Not what d7 said."}, {"id": "e", "text": "More."}]
    )
    config = config_of(tmp_path)
    counts = reindex(config).snapshot.counts
    assert (counts["rows"], counts["documents"], counts["duplicates"], counts["rejected"]) == (64, 60, 2, 2)
    texts = live_texts(config)
    assert set(texts) == {row["id"] for row in rows} - {"d7"} | {"e"}
    assert texts["d3"] == [rows[3]["text"]]
    assert texts["d5"] == [rows[5]["text"]]
    storage = Storage(config.root)
    snapshot = load(SnapshotManifest, storage, layout.snapshot(open_live(config).manifest.snapshot))
    rejected = rejected_rows(storage, snapshot, 99)
    assert sorted((row["source_uri"].rpartition("/")[2], row["source_row"], row["code"]) for row in rejected) == [
        ("a.jsonl", 7, "E_DUP_ID"),
        ("b.jsonl", 1, "E_DUP_ID"),
    ]
    assert audit(config, 100).passages == 60
    again = reindex(config)
    assert (again.encoded, again.committed) == (0, False)


def test_deletes_leave_ids_out_and_are_taken_back(tmp_path):
    write_jsonl(tmp_path / "corpus" / "a.jsonl", sentences(50))
    (tmp_path / "gone.csv").write_text("id\nd1\nd49\nunknown\n")
    config = config_of(tmp_path, corpus={"deletes": str(tmp_path / "gone.csv")})
    first = reindex(config)
    assert (first.snapshot.counts["documents"], first.snapshot.counts["deleted"], first.encoded) == (48, 2, 48)
    assert not {"d1", "d49"} & set(live_texts(config))
    (tmp_path / "gone.csv").write_text("id\nd1\n")
    second = reindex(config)
    assert (second.encoded, set(live_texts(config))) == (1, {f"d{number}" for number in range(50)} - {"d1"})
    (tmp_path / "gone.csv").write_text("id\n,\n")
    with pytest.raises(DataError, match=r"gone.csv row 0: E_COLUMNS"):
        reindex(config)


def test_a_corpus_that_grows_keeps_what_is_gone_and_takes_the_later_row(tmp_path):
    rows = sentences(40)
    write_jsonl(tmp_path / "corpus" / "day-1.jsonl", rows)
    config = config_of(tmp_path, corpus={"mode": "append"})
    assert reindex(config).encoded == 40
    (tmp_path / "corpus" / "day-1.jsonl").unlink()
    write_jsonl(
        tmp_path / "corpus" / "day-2.jsonl", [{"id": "d0", "text": "What d0 says now."}, rows[1], *sentences(5, start=40)]
    )
    second = reindex(config)
    counts = second.snapshot.counts
    assert (second.encoded, counts["documents"], counts["replaced"], counts["duplicates"]) == (6, 45, 1, 1)
    assert len(second.snapshot.generations) == 2
    texts = live_texts(config)
    assert set(texts) == {f"d{number}" for number in range(45)}
    assert texts["d0"] == ["What d0 says now."]
    assert not reindex(config).committed
    with pytest.raises(ConfigError, match=r"day-1.jsonl must be read again and is not there"):
        reindex(config_of(tmp_path, corpus={"mode": "append"}, passages={"long": "truncate"}))


def test_half_an_export_does_not_go_live(tmp_path):
    write_jsonl(tmp_path / "corpus" / "a.jsonl", sentences(100))
    config = config_of(tmp_path)
    live = reindex(config).live
    write_jsonl(tmp_path / "corpus" / "a.jsonl", sentences(70))
    with pytest.raises(DataError, match=r"70 documents, artifact .* has 100: more than publish.max_shrink 0.2"):
        reindex(config)
    assert open_live(config).manifest.version == live.version
    assert reindex(config_of(tmp_path, publish={"max_shrink": 0.5})).committed


def test_skipped_file_and_abort(tmp_path):
    write_jsonl(tmp_path / "corpus" / "a.jsonl", sentences(30))
    (tmp_path / "corpus" / "b.jsonl.gz").write_bytes(b"no gzip at all")
    with pytest.raises(DataError, match=r"b.jsonl.gz: E_COMPRESSION"):
        reindex(config_of(tmp_path))
    found = reindex(config_of(tmp_path, corpus={"on_error": "skip_file"}))
    assert (found.snapshot.counts["documents"], found.snapshot.counts["skipped_files"]) == (30, 1)
    (row,) = rejected_rows(Storage(str(tmp_path / "root")), found.snapshot, 9)
    assert (row["code"], row["source_row"], row["source_uri"].endswith("b.jsonl.gz")) == ("E_COMPRESSION", None, True)
    (tmp_path / "corpus" / "b.jsonl.gz").unlink()
    with (tmp_path / "corpus" / "a.jsonl").open("a") as out:
        out.write('{"id": "x", "text": null}\n')
    with pytest.raises(DataError, match=r"1 of 31 rows rejected, the ceiling is 0: .*a.jsonl row 30 E_NULL_TEXT"):
        reindex(config_of(tmp_path, corpus={"on_error": "abort"}))


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """A root with two artifacts that were live, to be copied by each test."""
    return two_artifacts(tmp_path_factory.mktemp("twice"))


def two_artifacts(folder):
    write_jsonl(folder / "corpus" / "a.jsonl", sentences(60))
    reindex(config_of(folder))
    write_jsonl(folder / "corpus" / "a.jsonl", sentences(65, start=5))
    reindex(config_of(folder))
    return folder


@pytest.fixture
def folder(twice, tmp_path):
    return shutil.copytree(twice, tmp_path / "copy")


def test_rollback_puts_the_artifact_before_live(folder):
    config = config_of(folder)
    second = open_live(config).manifest
    first = upkeep.rollback(config, None)
    assert open_live(config).manifest.version == first.version != second.version
    assert "d0" in live_texts(config)
    assert upkeep.rollback(config, second.version).version == second.version
    with pytest.raises(ConfigError, match=r"artifact nope was never live; those that were: "):
        upkeep.rollback(config, "nope")


def test_gc_keeps_what_is_needed_and_nothing_else(tmp_path):
    folder = two_artifacts(tmp_path)
    config = config_of(folder)
    live = open_live(config).manifest
    stray = folder / "root" / "artifacts" / "000099-dead" / "vectors.f16"
    stray.parent.mkdir()
    stray.write_bytes(b"left by a run that was killed")
    (folder / "root" / "ours.txt").write_text("not a file of vecmill")
    assert not upkeep.collect(config, 1, 3600.0).files.keys() - {layout.BEATS}  # younger than the grace period
    wanted = upkeep.collect(config, 1, -1.0, dry_run=True)
    assert stray.is_file()
    done = upkeep.collect(config, 1, -1.0)
    assert {name: count for name, count in done.files.items() if name != layout.BEATS} == {
        name: count for name, count in wanted.files.items() if name != layout.BEATS
    }
    assert done.kept == (live.version,)
    assert not stray.exists()
    assert (folder / "root" / "ours.txt").is_file()
    assert [path.name for path in (folder / "root" / "artifacts").iterdir() if any(path.iterdir())] == [live.version]
    verify(Storage(config.root), layout.artifact(live.version))
    assert audit(config, 100).passages == 65
    again = reindex(config)
    assert (again.encoded, again.committed) == (0, False)
    with pytest.raises(ConfigError, match="no earlier artifact"):
        upkeep.rollback(config, None)
    write_jsonl(folder / "corpus" / "a.jsonl", sentences(66, start=5))
    assert reindex(config).encoded == 1


def test_gc_keeps_two_artifacts_that_can_be_gone_back_to(folder):
    config = config_of(folder)
    upkeep.collect(config, 2, -1.0)
    upkeep.rollback(config, None)
    assert audit(config, 100).passages == 60


def test_unlock_takes_the_root_from_a_writer_who_can_commit_no_more(folder):
    config = config_of(folder)
    storage = Storage(config.root)
    assert unlock(storage) is None
    with writing(storage, "paused", 30.0) as lease:
        assert unlock(storage).run == "paused"
        assert Log(storage).refresh().holder is None
        with pytest.raises(LockedError, match="lost the root"):
            lease.commit("000001-x", "0" * 64)
    assert [entry.kind for entry in Log(storage).refresh().entries[-2:]] == ["acquire", "release"]


@pytest.mark.parametrize(("as_float32", "with_text"), [(False, True), (True, False)])
def test_export_is_parquet_that_any_tool_reads(tmp_path, as_float32, with_text):
    rows = [*sentences(40), {"id": "same", "text": sentences(1)[0]["text"]}]
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows)
    config = config_of(tmp_path)
    reindex(config)
    out = tmp_path / "out" / "all.parquet"
    assert export(config, str(out), as_float32=as_float32, with_text=with_text) == 41
    table = pq.read_table(out)
    kind = pa.float32() if as_float32 else pa.float16()
    assert table.schema.field("embedding").type == pa.list_(kind, 384)
    assert ("text" in table.column_names) == with_text
    vectors = {row["doc_id"]: np.array(row["embedding"], dtype=np.float32) for row in table.to_pylist()}
    assert set(vectors) == {row["id"] for row in rows}
    assert (vectors["same"] == vectors["d0"]).all()
    found = open_live(config).searcher.search(vectors["d7"][None], 1)[0][0]
    assert found.doc_id == "d7"
    assert abs(np.linalg.norm(vectors["d7"]) - 1) < 1e-3
    with pytest.raises(ConfigError, match="name the Parquet file"):
        export(config, f"{tmp_path}/out/")
