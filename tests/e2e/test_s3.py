"""The same job on a real S3 server gives the artifact answers of local files."""

import json
import os
import subprocess

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.artifacts import artifact
from pipeline.artifacts.live import open_live
from pipeline.errors import VerificationError
from pipeline.root import layout
from pipeline.root.storage import Storage
from pipeline.run import reindex
from tests.conftest import make_config, sentences
from tests.e2e.test_cli import VECMILL, vecmill


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("kind", ["flat", "ivfpq"])
def test_job_on_s3_answers_as_on_local_files(tmp_path, s3, kind, monkeypatch):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    rows = sentences(400)
    pq.write_table(
        pa.table({"id": [row["id"] for row in rows[:300]], "text": [row["text"] for row in rows[:300]]}), corpus / "a.parquet"
    )
    pq.write_table(
        pa.table({"id": [row["id"] for row in rows[300:]], "text": [row["text"] for row in rows[300:]]}),
        corpus / "b b%.parquet",
    )
    bucket = Storage(f"s3://test/{tmp_path.name}", s3.store_config)
    for file in corpus.iterdir():
        bucket.put(f"corpus/{file.name}", file.read_bytes())

    index = {"kind": kind, "m": 32}
    search = {"nprobe": 64, "rescore": 100}  # measured times must not choose what the answers are
    local = make_config(tmp_path / "root", corpus, index=index, search=search)
    cached = {"cache_dir": str(tmp_path / "cache"), **search}
    remote = make_config(bucket.at("root"), bucket.at("corpus"), index=index, store=s3.store, search=cached)
    first = reindex(local)
    second = reindex(remote)
    assert second.committed
    assert second.encoded == first.encoded == 400
    assert second.live.counts == first.live.counts
    said = []
    again = reindex(remote, say=said.append)
    assert (again.encoded, again.committed) == (0, False)
    root = Storage(bucket.at("root"), s3.store_config)
    written = b"".join(root.read(file.path) for file in root.walk())
    for secret in (s3.key, s3.secret):
        assert secret.encode() not in written
        assert secret not in repr(said) + repr(remote) + repr(root) + second.live.model_dump_json()

    one, two = open_live(local), open_live(remote)
    assert (one.partition.collection.vectors == two.partition.collection.vectors).all()
    queries = one.partition.collection.vectors[::5].astype(np.float32)
    mine, theirs = (opened.searcher.search(queries, 10) for opened in (one, two))
    assert [[(hit.doc_id, hit.text) for hit in hits] for hits in mine] == [
        [(hit.doc_id, hit.text) for hit in hits] for hits in theirs
    ]
    assert theirs[0][0].source_uri.startswith(bucket.at("corpus/"))

    folder = layout.artifact(second.live.version)
    assert artifact.verify(Storage(bucket.at("root"), s3.store_config), folder).version == second.live.version

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps({"root": bucket.at("root"), "corpus": {"uri": bucket.at("corpus")}, "search": cached}))
    found = json.loads(vecmill("search", "-c", file, rows[42]["text"], "-k", 1, "--json").stdout)
    assert found["hits"][0]["doc_id"] == "d42"

    storage = Storage(bucket.at("root"), s3.store_config)
    data = bytearray(storage.read(f"{folder}/vectors.f16"))
    data[100] ^= 1
    storage.put(f"{folder}/vectors.f16", bytes(data))
    with pytest.raises(VerificationError, match=r"vectors\.f16"):
        artifact.verify(storage, folder)
    assert vecmill("verify", "-c", file, check=False).returncode == 5


@pytest.mark.usefixtures("no_ray")
def test_of_two_runs_at_once_one_works_and_the_other_exits_4(tmp_path, s3):
    bucket = Storage(f"s3://test/{tmp_path.name}", s3.store_config)
    bucket.put("corpus/a.jsonl", "".join(json.dumps(row) + "\n" for row in sentences(4000)).encode())
    keys = {"AWS_ACCESS_KEY_ID": s3.key, "AWS_SECRET_ACCESS_KEY": s3.secret, "AWS_ENDPOINT_URL": s3.endpoint}
    environment = os.environ | keys | {"AWS_DEFAULT_REGION": "us-east-1"}
    settings = {"root": bucket.at("root"), "corpus": {"uri": bucket.at("corpus")}, "compute": {"lease_ttl_s": 3}}
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps(settings))
    runs = [
        subprocess.Popen([str(VECMILL), "reindex", "-c", str(file)], stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    told = {run.returncode: errors for run, (_, errors) in [(run, run.communicate(timeout=200)) for run in runs]}
    assert set(told) == {0, 4}, told
    assert "another run is writing: " in told[4]
    assert "is live, commit" in told[0]
    storage = Storage(bucket.at("root"), s3.store_config)
    kinds = [json.loads(storage.read(path))["kind"] for path in storage.list("log")]
    assert kinds == ["acquire", "commit", "release"]
