"""What is done to an artifact that is live: measured again, rebuilt, audited; with each way of re-scoring."""

import json
import shutil

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from pipeline.artifacts.artifact import verify
from pipeline.artifacts.audit import audit
from pipeline.artifacts.live import open_live
from pipeline.errors import ConfigError, VerificationError
from pipeline.root import layout
from pipeline.root.log import Log
from pipeline.root.storage import Storage
from pipeline.run import reindex, tune
from tests.conftest import make_config, sentences, stored_documents, write_jsonl
from tests.e2e.test_reindex import commits, files_below, search

pytestmark = pytest.mark.usefixtures("local_ray")

IVF = {"kind": "ivfpq", "nlist": 10, "m": 32}


def config_of(folder, **sections):
    return make_config(folder / "root", folder / "a.jsonl", **({"index": IVF} | sections))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A live artifact of 400 passages, to be copied by each test."""
    folder = tmp_path_factory.mktemp("upkeep")
    write_jsonl(folder / "a.jsonl", sentences(400))
    reindex(config_of(folder))
    return folder


@pytest.fixture
def folder(built, tmp_path):
    return shutil.copytree(built, tmp_path / "copy")


def test_tune_commits_the_same_artifact_with_other_settings(folder):
    before = open_live(config_of(folder)).manifest
    artifacts = files_below(folder / "root" / "artifacts")
    wanted = {"search": {"nprobe": 2, "rescore": 50}, "evaluation": {"sample": 50}}
    tuned = tune(config_of(folder, **wanted))
    assert files_below(folder / "root" / "artifacts") == artifacts
    assert (tuned.version, tuned.evaluation.queries) == (before.version, 50)
    assert (tuned.evaluation.point.nprobe, tuned.evaluation.point.rescore) == (2, 50)
    assert before.evaluation.point.nprobe > 2
    opened = open_live(config_of(folder))
    assert opened.manifest.evaluation == tuned.evaluation
    assert opened.searcher.point == tuned.evaluation.point
    assert len(commits(config_of(folder))) == 2
    commit = Log(Storage(str(folder / "root"))).refresh().live
    measured = folder / "root" / layout.run(commit.run, commit.evaluation.name)
    measured.write_bytes(measured.read_bytes().replace(b'"k": 10', b'"k": 11'))
    with pytest.raises(VerificationError, match=r"evaluation-.*not those of the manifest"):
        open_live(config_of(folder))


def test_reindex_measures_again_when_other_recall_is_wanted(folder):
    reindex(config_of(folder))  # the corpus has moved
    artifacts = files_below(folder / "root" / "artifacts")
    wanted = config_of(folder, index=IVF | {"target_recall": 0.2})
    outcome = reindex(wanted)
    assert (outcome.built, outcome.committed, outcome.trained) == (None, True, False)
    assert files_below(folder / "root" / "artifacts") == artifacts
    assert not reindex(wanted).committed


def test_tune_refuses_another_encoder_and_a_missed_gate(folder):
    with pytest.raises(ConfigError, match="the config's encoder"):
        tune(config_of(folder, encoder={"max_tokens": 64}))
    with pytest.raises(VerificationError, match="nothing went live"):
        tune(config_of(folder, publish={"min_recall": 1.0}, search={"nprobe": 1, "rescore": 1}))
    assert len(commits(config_of(folder))) == 1


def test_rebuild_trains_for_the_corpus_of_today(folder):
    first = open_live(config_of(folder)).manifest
    write_jsonl(folder / "a.jsonl", sentences(420))
    kept = reindex(config_of(folder))
    assert (kept.trained, kept.live.index.trained) == (False, first.index.trained)
    rebuilt = reindex(config_of(folder), encode=False, rebuild=True)
    assert (rebuilt.trained, rebuilt.committed, rebuilt.encoded) == (True, True, 0)
    assert rebuilt.live.index.trained != first.index.trained
    again = reindex(config_of(folder), encode=False, rebuild=True)
    assert (again.trained, again.committed) == (False, True)
    assert again.live.version != rebuilt.live.version
    assert again.live.index.trained == rebuilt.live.index.trained


@pytest.mark.parametrize("rescore", ["int8", "none"])
def test_rescoring_from_int8_or_not_at_all(folder, rescore):
    exact = search(config_of(folder), "a note on the harbour", 10)
    config = config_of(folder, index=IVF | {"rescore": rescore})
    outcome = reindex(config)
    assert (outcome.encoded, outcome.trained, outcome.index_shards, outcome.committed) == (0, False, 0, True)
    files = verify(Storage(config.root), layout.artifact(outcome.live.version)).files
    assert ("vectors.int8" in files) == (rescore == "int8")
    if rescore == "int8":
        assert files["vectors.int8"].size_bytes == 400 * (384 + 4)
        assert outcome.live.evaluation.recall > 0.95
    assert (outcome.live.evaluation.point.rescore == 0) == (rescore == "none")
    found = search(config, "a note on the harbour", 10)
    assert len({hit.doc_id for hit in found} & {hit.doc_id for hit in exact}) >= (9 if rescore == "int8" else 3)
    assert audit(config, 100).codes == 100


@pytest.mark.parametrize("kind", ["flat", "ivfpqfs", "ivfrabitq", "ivfsq8"])
def test_audit_finds_nothing_wrong(folder, kind):
    config = config_of(folder, index={"kind": kind, "nlist": 8, "partitions": 2})
    reindex(config)
    found = audit(config, 150)
    assert (found.passages, found.document_rows, found.vectors) == (400, 400, 150)
    assert found.codes == (0 if kind == "flat" else 150)
    assert found.other_codes <= 1


def foreign_codes(root):
    return next((root / "shards").glob("*/*.json")), {b"vecmill.trained": b"another"}, None


def short_codes(root):
    file = next((root / "shards").glob("*/*.json"))
    return file, {b"vecmill.trained": file.parent.name.encode()}, "code"


def foreign_vectors(root):
    return next((root / "embeddings").glob("*/*.json")), {b"vecmill.encoder": b"another"}, None


def short_vectors(root):
    file = next((root / "embeddings").glob("*/*.json"))
    return file, {b"vecmill.encoder": file.parent.name.encode()}, "embedding"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (foreign_codes, "codes of trained index another"),
        (short_codes, r"31 bytes each, 400 rows; expected \w+, 33 bytes"),
        (foreign_vectors, "384 dimensions by encoder another, expected 384 by"),
        (short_vectors, r"383 dimensions by encoder \w+, expected 384 by"),
    ],
)
def test_merge_refuses_foreign_shards(folder, spoil, message):
    record_file, metadata, cut = spoil(folder / "root")
    record = json.loads(record_file.read_text())
    file = record_file.parent / record["files"][0]["name"]
    table = pq.read_table(file)
    if cut:
        short = pa.array([value.as_py()[:-2] for value in table.column(cut)], pa.binary(table.column(cut).type.byte_width - 2))
        table = table.set_column(table.column_names.index(cut), pa.field(cut, short.type, nullable=False), short)
    pq.write_table(table.replace_schema_metadata(metadata), file)
    with pytest.raises(VerificationError, match=message):
        reindex(config_of(folder), rebuild=True)


def spoil_documents(artifact):
    table = stored_documents(artifact)
    texts = table.column("text").to_pylist()
    texts[7], texts[300] = texts[300], texts[7]
    swapped = table.set_column(
        table.schema.get_field_index("text"), table.schema.field("text"), pa.array(texts, pa.large_string())
    )
    feather.write_feather(swapped, artifact / "documents.arrow")


def lose_a_document(artifact):
    table = stored_documents(artifact)
    feather.write_feather(pa.concat_tables([table.slice(0, 50), table.slice(51)]), artifact / "documents.arrow")


def spoil_vectors(artifact):
    vectors = np.fromfile(artifact / "vectors.f16", dtype="<f2").reshape(400, -1)
    vectors[[20, 21]] = vectors[[21, 20]]
    vectors.tofile(artifact / "vectors.f16")


def spoil_ids(artifact):
    index = faiss.read_index(str(artifact / "index.faiss"))
    ids = np.concatenate([entry for number in range(10) if len(entry := list_ids(index, number))])
    empty = faiss.read_index(str(artifact / "index.faiss"))
    empty.reset()
    ids[ids == 33] = 34
    vectors = np.fromfile(artifact / "vectors.f16", dtype="<f2").reshape(400, -1).astype(np.float32)
    empty.add_with_ids(vectors[: len(ids)], ids)
    faiss.write_index(empty, str(artifact / "index.faiss"))


def list_ids(index, number):
    return faiss.rev_swig_ptr(index.invlists.get_ids(number), index.invlists.list_size(number)).copy()


def spoil_codes(artifact):
    index = faiss.read_index(str(artifact / "index.faiss"))
    index.reset()
    vectors = np.fromfile(artifact / "vectors.f16", dtype="<f2").reshape(400, -1).astype(np.float32)
    index.add_with_ids(vectors[::-1].copy(), np.arange(400))
    faiss.write_index(index, str(artifact / "index.faiss"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_documents, "row 7 is not the text of passage 7"),
        (lose_a_document, "passage 50 has no row"),
        (spoil_vectors, "vector 20 is not that of the embedding store"),
        (spoil_ids, "passage 33 is not in the index exactly once"),
        (spoil_codes, "index entries have not the list and code of their vector"),
    ],
)
def test_audit_names_what_is_wrong(folder, spoil, message, monkeypatch):
    monkeypatch.setattr("pipeline.artifacts.artifact.check_sizes", lambda *_: None)  # which would tell of some of these first
    config = config_of(folder)
    live = open_live(config).manifest
    spoil(folder / "root" / layout.artifact(live.version))
    with pytest.raises(VerificationError, match=message) as error:
        audit(config, 400)
    assert "run vecmill index --rebuild" in str(error.value)


def test_audit_tells_of_a_snapshot_that_is_another(folder):
    config = config_of(folder)
    live = open_live(config).manifest
    file = folder / "root" / layout.snapshot(live.snapshot)
    snapshot = json.loads(file.read_text())
    file.write_text(json.dumps(snapshot | {"units": []}))
    with pytest.raises(VerificationError):
        audit(config, 10)
    file.unlink()
    with pytest.raises(VerificationError, match=r"missing, artifact .* names it"):
        audit(config, 10)
