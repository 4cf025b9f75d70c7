"""The whole job with real Ray, real Parquet, the real model and real FAISS, on local files."""

import json
import shutil
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from jobs.demo_corpus import docstrings
from pipeline.artifacts import artifact
from pipeline.artifacts.live import open_live, open_uri
from pipeline.encoder import load_query_encoder
from pipeline.encoding.tokenizer import TextTokenizer
from pipeline.errors import ConfigError, DataError, VerificationError
from pipeline.ingest.snapshot import parts
from pipeline.root import layout
from pipeline.root.log import Log
from pipeline.root.manifest import Record, to_bytes
from pipeline.root.storage import Storage
from pipeline.run import embed_only, ingest_only, reindex
from tests.conftest import make_config, sentences, stored_documents, write_jsonl

pytestmark = pytest.mark.usefixtures("local_ray")


def encode(opened, texts):
    return load_query_encoder(opened.spec).encode_queries(texts)


def search(config, text, k=5):
    opened = open_live(config)
    return opened.searcher.search(encode(opened, [text]), k)[0]


def commits(config):
    return [entry for entry in Log(Storage(config.root)).refresh().entries if entry.kind == "commit"]


def files_below(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def real_rows():
    """1,200 real docstrings."""
    return [
        {"id": row["id"], "text": row["text"], "kind": row["kind"]} for row, _ in zip(docstrings(), range(1200), strict=False)
    ]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Embeddings for tests of what comes after: the same notes need not be encoded for each."""
    return {"embeddings": str(tmp_path_factory.mktemp("store"))}


def test_artifact_is_complete_and_opens_with_plain_faiss(tmp_path, real_rows):
    write_jsonl(tmp_path / "corpus" / "a.jsonl", real_rows)
    config = make_config(tmp_path / "root", tmp_path / "corpus", corpus={"metadata": ["kind"]})
    outcome = reindex(config)
    assert outcome.committed
    assert outcome.encoded == outcome.live.counts["passages"] >= 1200
    folder = tmp_path / "root" / layout.artifact(outcome.live.version)
    assert sorted(path.name for path in folder.iterdir()) == [
        "documents.arrow",
        "index.faiss",
        "manifest.json",
        "metadata.arrow",
        "report.html",
        "report.json",
        "vectors.f16",
    ]
    index = faiss.read_index(str(folder / "index.faiss"))
    vectors = np.fromfile(folder / "vectors.f16", dtype="<f2").reshape(index.ntotal, -1)
    documents = stored_documents(folder).to_pylist()
    texts = {row["id"]: row["text"] for row in real_rows}
    for row in documents[::97]:
        assert texts[row["doc_id"]][row["start"] : row["end"]] == row["text"]
        assert real_rows[row["source_row"]]["id"] == row["doc_id"]
        assert json.loads(row["metadata"])["kind"] in {"module", "class", "function"}
    opened = open_live(config)
    own = encode(opened, [row["text"] for row in documents[:20]])
    assert ((own * vectors[[row["ordinal"] for row in documents[:20]]].astype(np.float32)).sum(axis=1) > 0.999).all()
    assert index.search(own, 1)[1][:, 0].tolist() == [row["ordinal"] for row in documents[:20]]


def test_second_run_does_nothing(tmp_path, real_rows):
    write_jsonl(tmp_path / "a.jsonl", real_rows[:400])
    config = make_config(tmp_path / "root", tmp_path / "a.jsonl", index={"kind": "ivfpq", "nlist": 4, "m": 32, "nbits": 8})
    first = reindex(config)
    assert (first.committed, first.trained, first.index_shards) == (True, True, 1)
    before = files_below(tmp_path / "root")
    second = reindex(config)
    assert (second.encoded, second.trained, second.index_shards, second.built, second.committed) == (0, False, 0, None, False)
    assert len(commits(config)) == 1
    after = files_below(tmp_path / "root")
    new = {path.parts[len(tmp_path.parts) + 1] for path in after.keys() - before.keys()}
    assert new <= {"log", "beats", "runs"}
    told = {path.parent.name for path in after.keys() - before.keys() if "runs" in path.parts}
    assert told == {second.run, "events"}  # what it expected and how it went
    assert all(after[path] == stamp for path, stamp in before.items())


@pytest.mark.parametrize("kind", ["flat", "ivfpq"])
def test_change_add_delete_in_a_renamed_file_encodes_two(tmp_path, real_rows, kind):
    rows = [dict(row) for row in real_rows if len(row["text"]) < 600][:500]
    write_jsonl(tmp_path / "corpus" / "monday.jsonl", rows)
    settings = {"index": {"kind": kind, "m": 32}, "search": {"nprobe": 64}}  # no times choose how much is found
    config = make_config(tmp_path / "root", tmp_path / "corpus", **settings)
    first = reindex(config)
    assert first.encoded == first.live.counts["passages"]

    deleted, changed = rows[7], rows[40]
    edited = [row for row in rows if row is not deleted]
    edited[edited.index(changed)] = changed | {"text": "A page about volcanic islands in the southern ocean."}
    edited.insert(100, {"id": "new", "text": "How to bake rye bread with caraway seeds.", "kind": "function"})
    (tmp_path / "corpus" / "monday.jsonl").unlink()
    write_jsonl(tmp_path / "corpus" / "tuesday.jsonl", edited)

    second = reindex(config)
    assert second.encoded == 2
    assert not second.trained
    assert second.live.index.trained == first.live.index.trained
    assert search(config, "volcanic islands", 1)[0].doc_id == changed["id"]
    assert search(config, "rye bread", 1)[0].doc_id == "new"
    assert deleted["id"] not in {hit.doc_id for hit in search(config, deleted["text"], 10)}
    assert all(deleted["text"] != hit.text for hit in search(config, deleted["text"], 10))

    scratch = make_config(tmp_path / "scratch", tmp_path / "corpus", **settings)
    for folder in ("trained", layout.artifact(first.live.version)):
        shutil.copytree(tmp_path / "root" / folder, tmp_path / "scratch" / folder)
    (tmp_path / "scratch" / "log").mkdir()
    for entry in sorted((tmp_path / "root" / "log").iterdir())[:3]:
        shutil.copy(entry, tmp_path / "scratch" / "log")
    fresh = reindex(scratch)
    assert (fresh.encoded, fresh.trained) == (fresh.live.counts["passages"], False)
    assert_equal_answers(config, scratch, exact=kind == "flat")


def assert_equal_answers(config, other, *, exact):
    """DESIGN's equal answers: ordinals, documents and counts exactly, neighbours where their gap exceeds 1e-3."""
    one, two = open_live(config), open_live(other)
    folders = [Path(each.root) / layout.artifact(opened.manifest.version) for each, opened in ((config, one), (other, two))]
    tables = [stored_documents(folder).drop_columns(["source_uri", "source_row"]) for folder in folders]
    assert tables[0].equals(tables[1])
    assert {key: one.manifest.counts[key] for key in ("documents", "passages", "rejected")} == {
        key: two.manifest.counts[key] for key in ("documents", "passages", "rejected")
    }
    queries = one.partition.collection.vectors[::3].astype(np.float32)
    point = one.manifest.evaluation.point
    how = {"nprobe": point.nprobe, "rescoring": point.rescore}
    scores, ordinals = one.partition.collection.search(queries, 11, **how)
    _, other_ordinals = two.partition.collection.search(queries, 11, **how)
    clear = (scores[:, :10] - scores[:, 1:]) > 1e-3
    assert clear.sum() > 500
    same = (ordinals[:, :10] == other_ordinals[:, :10])[clear].mean()
    assert same >= (0.999 if exact else 0.99)


def test_equal_texts_are_encoded_once_and_all_documents_returned(tmp_path):
    rows = sentences(30) + [{"id": f"copy{n}", "text": sentences(1)[0]["text"]} for n in range(4)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    config = make_config(tmp_path / "root", tmp_path / "a.jsonl")
    outcome = reindex(config)
    assert (outcome.encoded, outcome.live.counts["document_rows"]) == (30, 34)
    hits = search(config, rows[0]["text"], 6)
    assert [hit.doc_id for hit in hits[:5]] == ["copy0", "copy1", "copy2", "copy3", "d0"]
    assert len({hit.score for hit in hits[:5]}) == 1
    assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5, 6]
    assert [hit.doc_id for hit in search(config, rows[0]["text"], 3)] == ["copy0", "copy1", "copy2"]


@pytest.mark.parametrize("count", [1, 10, 300])
@pytest.mark.parametrize("kind", ["auto", "ivfpq"])
def test_tiny_corpora_work_and_say_so(tmp_path, store, count, kind):
    write_jsonl(tmp_path / "a.jsonl", sentences(count))
    config = make_config(tmp_path / "root", tmp_path / "a.jsonl", index={"kind": kind}, store=store)
    outcome = reindex(config)
    chosen = outcome.live.index
    assert chosen.kind == ("ivfpq" if kind == "ivfpq" and count == 300 else "flat")
    assert str(count) in chosen.why
    assert outcome.live.evaluation.gated == (count >= 100)
    hits = search(config, sentences(count)[-1]["text"], 10)
    assert hits[0].doc_id == f"d{count - 1}"
    assert len(hits) == min(10, count)


def test_encoder_changes_never_mix_vectors(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", sentences(20))
    stores: set[str] = set()
    numerics = ({"precision": "fp32"}, {"precision": "bf16", "backend": "torch"})  # which any CPU can do
    for change in ({}, {"document_prompt": "passage: "}, {"max_tokens": 16}, *numerics):
        config = make_config(tmp_path / "root", tmp_path / "a.jsonl", encoder=change)
        outcome = reindex(config)
        fingerprint = outcome.live.encoder["fingerprint"]
        assert outcome.encoded == (0 if fingerprint in stores else 20), change
        stores.add(fingerprint)
    assert {path.name for path in (tmp_path / "root" / "embeddings").iterdir()} == stores
    assert len(stores) >= 4
    with pytest.raises(ConfigError, match="is another; run vecmill reindex"):
        open_live(make_config(tmp_path / "root", tmp_path / "a.jsonl", encoder={"document_prompt": "other: "}))


def test_artifact_is_relocatable(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", sentences(40))
    config = make_config(tmp_path / "root", tmp_path / "a.jsonl")
    version = reindex(config).live.version
    shutil.copytree(tmp_path / "root" / layout.artifact(version), tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "root")
    opened = open_uri(str(tmp_path / "elsewhere"))
    assert artifact.verify(Storage(str(tmp_path / "elsewhere")), "").version == version
    assert opened.searcher.search(encode(opened, [sentences(40)[3]["text"]]), 1)[0][0].doc_id == "d3"


def test_every_flipped_byte_is_found(tmp_path, store):
    write_jsonl(tmp_path / "a.jsonl", sentences(300))
    config = make_config(tmp_path / "root", tmp_path / "a.jsonl", index={"kind": "ivfpq"}, store=store)
    folder = tmp_path / "root" / layout.artifact(reindex(config).live.version)
    storage = Storage(str(folder))
    artifact.verify(storage, "")
    rng = np.random.default_rng(0)
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        for place in {0, len(whole) - 2, *rng.integers(0, len(whole) - 1, 40).tolist()}:
            damaged = bytearray(whole)
            damaged[place] ^= 1
            file.write_bytes(damaged)
            with pytest.raises(VerificationError, match=file.name):
                artifact.verify(storage, "")
        file.write_bytes(whole)
    (folder / "extra").write_text("x")
    with pytest.raises(VerificationError, match="extra: not in the manifest"):
        artifact.verify(storage, "")
    (folder / "extra").unlink()
    (folder / "vectors.f16").unlink()
    with pytest.raises(VerificationError, match=r"vectors\.f16: missing"):
        artifact.verify(storage, "")


def test_long_documents_are_split_or_truncated(tmp_path):
    long = " ".join(f"Sentence {n} tells of the {['sea', 'hill', 'wood'][n % 3]}." for n in range(300))
    rows = [{"id": "long", "text": long + " At last the needle in the haystack appears."}, *sentences(5)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    config = make_config(tmp_path / "root", tmp_path / "a.jsonl")
    outcome = reindex(config)
    assert (outcome.snapshot.counts["split"], outcome.snapshot.counts["truncated"]) == (1, 0)
    hit = search(config, "needle in a haystack", 1)[0]
    assert (hit.doc_id, rows[0]["text"][hit.start : hit.end]) == ("long", hit.text)
    assert hit.passage > 0
    assert len(search(config, "sea hill wood", 6)) == 6

    cut = make_config(tmp_path / "root2", tmp_path / "a.jsonl", passages={"long": "truncate"})
    counts = reindex(cut).snapshot.counts
    assert (counts["passages"], counts["split"], counts["truncated"]) == (6, 0, 1)


def test_the_mean_of_a_documents_windows_is_its_one_vector(tmp_path):
    parts = [f"Sentence {n} tells of the {['sea', 'hill', 'wood'][n % 3]}." for n in range(200)]
    rows = [{"id": "long", "text": " ".join(parts)}, *sentences(5)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    split = make_config(tmp_path / "split", tmp_path / "a.jsonl", passages={"tokens": 64, "overlap": 8})
    pooled = make_config(
        tmp_path / "pooled", tmp_path / "a.jsonl", passages={"tokens": 64, "overlap": 8, "pool": "mean"},
        store={"embeddings": str(tmp_path / "split" / "embeddings")},
    )  # fmt: skip
    outcome_of_split = reindex(split)
    assert outcome_of_split.snapshot.counts["split"] == 1
    outcome = reindex(pooled)
    assert (outcome.snapshot.counts["passages"], outcome.encoded) == (6, 6)
    windows = open_live(split).partition
    numbers = range(outcome_of_split.snapshot.counts["passages"] - 5)
    vectors = np.concatenate([windows.vector_of("long", number) for number in numbers])
    assert len(vectors) > 5
    mean = vectors.mean(axis=0)
    opened = open_live(pooled)
    found = opened.partition.vector_of("long", 0)[0]
    assert found @ mean / np.linalg.norm(mean) > 0.9999
    assert load_query_encoder(opened.spec).encode_documents([rows[0]["text"]])[0] @ found > 0.999
    assert np.allclose(opened.partition.vector_of("d1", 0), windows.vector_of("d1", 0), atol=1e-3)
    assert search(pooled, "sea hill wood", 6)[0].doc_id == "long"
    with pytest.raises(ConfigError, match=r"pooled windows of 64 that share 8; the config's encoder .* None"):
        open_live(make_config(tmp_path / "pooled", tmp_path / "a.jsonl", passages={"tokens": 64, "overlap": 8}))


def test_bad_rows_go_to_the_quarantine_up_to_the_ceiling(tmp_path):
    rows = sentences(50) + [{"id": f"bad{n}", "text": None} for n in range(11)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    config = make_config(tmp_path / "root", tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="11 of 61 rows rejected, the ceiling is 10"):
        reindex(config)
    assert commits(config) == []
    outcome = reindex(make_config(tmp_path / "root", tmp_path / "a.jsonl", corpus={"max_bad_fraction": 0.2}))
    counts = outcome.snapshot.counts
    assert (counts["rows"], counts["documents"], counts["rejected"]) == (61, 50, 11)
    (quarantine,) = (tmp_path / "root" / "passages").glob("*.rejected.parquet")
    rejected = pq.read_table(quarantine).to_pylist()
    assert {(row["code"], row["doc_id"]) for row in rejected} == {("E_NULL_TEXT", f"bad{n}") for n in range(11)}
    assert [row["source_row"] for row in rejected] == list(range(50, 61))


def test_broken_file_stops_the_run_by_name(tmp_path):
    write_jsonl(tmp_path / "c" / "a.jsonl", sentences(5))
    (tmp_path / "c" / "b.jsonl.gz").write_bytes(b"not gzip at all")
    with pytest.raises(DataError, match=r"b\.jsonl\.gz: E_COMPRESSION"):
        reindex(make_config(tmp_path / "root", tmp_path / "c"))


def test_gate_keeps_the_old_artifact_live(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", sentences(500))
    index = {"kind": "ivfpq", "nlist": 12, "m": 8, "nbits": 4, "target_recall": 0.01}
    settings = {"index": index, "search": {"nprobe": 1, "rescore": 0}}
    config = make_config(tmp_path / "root", tmp_path / "a.jsonl", **settings)
    first = reindex(config)
    assert first.live.evaluation.recall < 0.95
    write_jsonl(tmp_path / "a.jsonl", sentences(520))
    gated = make_config(tmp_path / "root", tmp_path / "a.jsonl", publish={"min_recall": 0.99}, **settings)
    with pytest.raises(VerificationError, match=r"publish\.min_recall is 0\.99") as error:
        reindex(gated)
    assert error.value.exit_code == 5
    assert open_live(config).manifest.version == first.live.version


def test_limit_and_no_publish_do_not_replace_what_is_live(tmp_path):
    write_jsonl(tmp_path / "c" / "a.jsonl", sentences(30))
    write_jsonl(tmp_path / "c" / "b.jsonl", sentences(30, start=30))
    config = make_config(tmp_path / "root", tmp_path / "c")
    slice_ = reindex(config, limit=40)
    assert (slice_.snapshot.counts["documents"], slice_.committed) == (40, True)
    built = reindex(config, go_live=False)
    assert (built.committed, built.encoded, built.live.version) == (False, 20, slice_.live.version)
    whole = reindex(config)
    assert (whole.committed, whole.encoded) == (True, 0)
    again = reindex(config, limit=10)
    assert not again.committed
    assert again.live.version == whole.live.version


def test_parts_of_the_job_add_up(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", sentences(25))
    config = make_config(tmp_path / "root", tmp_path / "a.jsonl")
    assert ingest_only(config).counts["documents"] == 25
    with pytest.raises(VerificationError, match="25 of 25 passages have no vector; run again"):
        reindex(config, encode=False)
    assert embed_only(config) == 25
    outcome = reindex(config, encode=False)
    assert (outcome.encoded, outcome.committed) == (0, True)


def test_text_files_parquet_and_csv_end_to_end(tmp_path):
    import pyarrow as pa

    rows = sentences(12)
    for row in rows:
        (tmp_path / "text" / "sub").mkdir(parents=True, exist_ok=True)
        (tmp_path / "text" / "sub" / f"{row['id']}.txt").write_text(row["text"])
    table = pa.table({"key": [row["id"] for row in rows], "body": [row["text"] for row in rows]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    (tmp_path / "a.csv").write_text("key,body\n" + "".join(f"{row['id']},{row['text']}\n" for row in rows))
    columns = {"id": "key", "text": "body"}
    for name, corpus, expected in (("text", {}, "sub/d4.txt"), ("a.parquet", columns, "d4"), ("a.csv", columns, "d4")):
        config = make_config(tmp_path / f"root-{name}", tmp_path / name, corpus=corpus)
        assert reindex(config).live.counts["documents"] == 12
        assert search(config, rows[4]["text"], 1)[0].doc_id == expected


def test_damaged_live_artifact_is_built_anew(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", sentences(20))
    config = make_config(tmp_path / "root", tmp_path / "a.jsonl")
    first = reindex(config)
    (tmp_path / "root" / layout.artifact(first.live.version) / "index.faiss").unlink()
    with pytest.raises(VerificationError, match=r"index\.faiss: missing"):
        open_live(config)
    second = reindex(config)
    assert (second.encoded, second.committed) == (0, True)
    assert second.live.version != first.live.version
    (tmp_path / "root" / layout.artifact(second.live.version) / "manifest.json").unlink()
    assert reindex(config).committed
    assert search(config, sentences(20)[3]["text"], 1)[0].doc_id == "d3"


def test_lost_ingest_record_stops_the_index_from_shrinking(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", sentences(20))
    config = make_config(tmp_path / "root", tmp_path / "a.jsonl")
    snapshot = ingest_only(config)
    storage = Storage(config.root)
    (tmp_path / "root" / "passages" / f"{snapshot.generations[0][0]}.json").unlink()
    with pytest.raises(VerificationError, match="gone, the snapshot names it"):
        parts(storage, snapshot)


def test_more_answers_than_the_lists_visited_hold(tmp_path, store):
    write_jsonl(tmp_path / "a.jsonl", sentences(400))
    index = {"kind": "ivfpq", "nlist": 10, "m": 32, "target_recall": 0.01}
    config = make_config(tmp_path / "root", tmp_path / "a.jsonl", index=index, search={"nprobe": 1}, store=store)
    assert reindex(config).live.evaluation.point.nprobe == 1
    assert len(search(config, "a note on the harbour", 350)) == 350


@pytest.mark.parametrize("kind", ["flat", "ivfpqfs", "ivfrabitq"])
def test_an_artifact_in_parts_answers_as_one(tmp_path, store, kind):
    write_jsonl(tmp_path / "a.jsonl", sentences(400))

    def config(**index):
        settings = {"index": {"kind": kind, "nlist": 8} | index, "search": {"nprobe": 4, "rescore": 10}}
        return make_config(tmp_path / "root", tmp_path / "a.jsonl", store=store, **settings)

    whole = reindex(config())
    assert [part.name for part in whole.live.parts] == ["index.faiss"]
    expected = search(config(), "a note on the harbour", 20)
    cut = reindex(config(partitions=3))
    assert (cut.encoded, cut.trained, cut.index_shards, cut.committed) == (0, False, 0, True)
    assert [(part.name, part.first, part.count) for part in cut.live.parts] == [
        ("index-0000.faiss", 0, 133),
        ("index-0001.faiss", 133, 133),
        ("index-0002.faiss", 266, 134),
    ]
    assert artifact.verify(Storage(config().root), layout.artifact(cut.live.version)).parts == cut.live.parts
    found = search(config(partitions=3), "a note on the harbour", 20)
    assert [hit.score for hit in found] == pytest.approx([hit.score for hit in expected], abs=1e-6)
    assert {hit.doc_id for hit in found[:10]} == {hit.doc_id for hit in expected[:10]}


def test_changed_target_recall_is_measured_again(tmp_path, store):
    write_jsonl(tmp_path / "a.jsonl", sentences(400))
    low = {"kind": "ivfpq", "nlist": 10, "m": 32, "target_recall": 0.01}
    reindex(make_config(tmp_path / "root", tmp_path / "a.jsonl", index=low, store=store))
    outcome = reindex(make_config(tmp_path / "root", tmp_path / "a.jsonl", index=low | {"target_recall": 0.99}, store=store))
    assert (outcome.encoded, outcome.trained, outcome.index_shards, outcome.committed) == (0, False, 0, True)
    assert outcome.live.evaluation.recall >= 0.99


def test_memory_root_is_refused():
    with pytest.raises(ConfigError, match="memory://"):
        reindex(make_config("memory://root", "/nowhere"))


@pytest.fixture
def poisoned_model(tmp_path, minilm):
    """MiniLM whose vector of any text with the word zebra is not finite."""
    folder = tmp_path / "model"
    shutil.copytree(minilm[1].path, folder)
    weights = load_file(folder / "model.safetensors")
    token = TextTokenizer(minilm[1], 256)(["zebra"])[0][1]
    weights[next(name for name in weights if name.endswith("word_embeddings.weight"))][token] = np.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_passages_without_a_vector_are_quarantined_and_harm_no_other(tmp_path, poisoned_model):
    rows = sentences(300)
    for number in (7, 8, 200):
        rows[number]["text"] = f"A zebra in note {number}."
    rows.append({"id": "twin", "text": rows[7]["text"]})
    write_jsonl(tmp_path / "a.jsonl", rows)
    encoder = {"model": str(poisoned_model)}
    config = make_config(tmp_path / "root", tmp_path / "a.jsonl", encoder=encoder, index={"kind": "flat"})
    said = []
    outcome = reindex(config, say=lambda event: said.append(event.message))
    counts = outcome.live.counts
    assert (counts["documents"], counts["passages"], counts["quarantined_rows"]) == (301, 297, 4)
    assert counts["document_rows"] + counts["quarantined_rows"] == 301
    assert any("300 passages = 297 with a vector + 3 quarantined" in message for message in said)
    assert search(config, rows[50]["text"], 1)[0].doc_id == "d50"
    found = {hit.doc_id for hit in search(config, "Note 7 on the violin and the harbour.", 300)}
    assert not found & {"d7", "d8", "d200", "twin"}

    again = reindex(config)
    assert (again.encoded, again.committed) == (0, False)
    quarantine = pq.read_table(tmp_path / "root" / "runs" / again.run / "quarantine.parquet").to_pylist()
    named = sorted((row["source_uri"], row["source_row"], row["doc_id"], row["code"]) for row in quarantine)
    assert named == [
        (str(tmp_path / "a.jsonl"), number, f"d{number}" if number < 300 else "twin", "E_NONFINITE")
        for number in (7, 8, 200, 300)
    ]
    assert all("not finite" in row["message"] and row["text_head"].startswith("A zebra") for row in quarantine)
    strict = make_config(
        tmp_path / "root",
        tmp_path / "a.jsonl",
        corpus={"max_bad_rows": 2, "max_bad_fraction": 0},
        encoder=encoder,
        index={"kind": "flat"},
    )
    for encode_first in (True, False):
        with pytest.raises(DataError, match="3 of 300 passages have no vector, the ceiling is 2"):
            reindex(strict, encode=encode_first)
    with pytest.raises(DataError, match="3 of 300 passages have no vector, the ceiling is 2"):
        embed_only(strict)


def test_records_say_what_encoding_took(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", sentences(600))
    config = make_config(tmp_path / "root", tmp_path / "a.jsonl", encoder={"precision": "int8"})
    said = []
    assert embed_only(config, say=lambda event: said.append(event.message)) == 600
    records = [Record.model_validate_json(path.read_bytes()) for path in (tmp_path / "root" / "embeddings").rglob("*.json")]
    for record in records:
        assert record.timings_s.keys() == {"read", "tokenize", "waiting", "encode", "check", "write"}
        assert record.counts["padded_tokens"] >= record.counts["tokens"] > 0
        assert record.counts["batch_tokens"] > 0
        assert 0 < record.rates["mfu"] < 4  # of int8, against the rate of bf16 or fp32
        assert 0.98 < record.rates["cosine_min"] <= record.rates["cosine_mean"] <= 1.0001
    assert any("tokens/s per encoder" in message and "cosine to fp32 0.99" in message for message in said)


def test_asymmetric_and_shortened_vectors_are_searched(tmp_path, minilm):
    shutil.copytree(minilm[1].path, tmp_path / "q")
    write_jsonl(tmp_path / "a.jsonl", sentences(120))
    encoder = {"query_model": str(tmp_path / "q"), "dim": 128}
    config = make_config(tmp_path / "root", tmp_path / "a.jsonl", encoder=encoder)
    outcome = reindex(config)
    assert (outcome.live.dim, outcome.live.encoder["query_model"]) == (128, str(tmp_path / "q"))
    assert search(config, "Note 50 on the harbour and the lantern.", 1)[0].doc_id == "d50"
    opened = open_uri(str(tmp_path / "root" / layout.artifact(outcome.live.version)))
    assert opened.searcher.search(encode(opened, ["Note 51 on the orchard and the lantern."]), 1)[0][0].doc_id == "d51"

    other = make_config(tmp_path / "root", tmp_path / "a.jsonl", encoder={"dim": 128})
    with pytest.raises(ConfigError, match=r"was made for queries by .*/q, the config has None; run vecmill reindex"):
        open_live(other)
    again = reindex(other)
    assert (again.encoded, again.committed, again.live.encoder["query_model"]) == (0, True, None)
    assert search(other, "Note 50 on the harbour and the lantern.", 1)[0].doc_id == "d50"


def test_an_artifact_cannot_let_its_model_run_code(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", sentences(40))
    config = make_config(tmp_path / "root", tmp_path / "a.jsonl")
    live = reindex(config).live
    folder = tmp_path / "root" / layout.artifact(live.version)
    encoder = live.encoder | {"trust_remote_code": True, "revision": "a" * 40}
    (folder / "manifest.json").write_bytes(to_bytes(live.model_copy(update={"encoder": encoder}).sealed()))
    with pytest.raises(ConfigError, match=r"runs code of its own; search with a config that has encoder\.trust_remote_code"):
        open_uri(str(folder))
    assert open_uri(str(folder), trust_remote_code=True).spec.trust_remote_code
