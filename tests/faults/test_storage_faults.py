"""Storage that breaks, stays away, only pretends, or is full."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from pipeline.artifacts.artifact import verify
from pipeline.artifacts.audit import audit
from pipeline.artifacts.publish import live_artifact
from pipeline.config import StoreConfig
from pipeline.errors import StorageError
from pipeline.root import layout, retries
from pipeline.root.log import Log
from pipeline.root.storage import Storage
from pipeline.run import reindex
from tests.conftest import make_config, sentences, write_jsonl
from tests.faults.alone import alone as alone  # a fixture
from tests.faults.proxy import KINDS, faults_before


def store_behind(proxy, s3):
    return {"s3": s3.store["s3"] | {"endpoint_url": proxy.endpoint}}


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("local_ray")
def test_a_job_over_a_bad_connection_makes_the_right_artifact(tmp_path, s3):
    rows = sentences(300)
    bucket = Storage(f"s3://test/{tmp_path.name}", s3.store_config)
    for number in range(3):
        file = write_jsonl(tmp_path / "c.jsonl", rows[100 * number : 100 * number + 100])
        bucket.put(f"corpus/{number}.jsonl", file.read_bytes())
    with faults_before(s3.endpoint, share=0.05) as proxy:
        config = make_config(
            bucket.at("root"), bucket.at("corpus"), index={"kind": "ivfpq"}, store=store_behind(proxy, s3),
            search={"cache_dir": str(tmp_path / "cache")},
        )  # fmt: skip
        outcome = reindex(config)
    assert outcome.committed
    assert outcome.live.counts["documents"] == outcome.encoded == 300
    assert set(proxy.broken) == set(KINDS), f"{proxy.methods.total()} requests were too few to meet every fault"
    assert 0 < outcome.retries <= sum(proxy.broken.values())
    report = Storage(bucket.at("root"), s3.store_config).read(f"{layout.artifact(outcome.live.version)}/report.json")
    assert 0 < json.loads(report)["retries"] <= outcome.retries
    direct = config.model_copy(update={"store": s3.store_config})
    verify(Storage(bucket.at("root"), s3.store_config), layout.artifact(outcome.live.version))
    assert audit(direct, 100).passages == 300
    kinds = [entry.kind for entry in Log(Storage(bucket.at("root"), s3.store_config)).refresh().entries]
    assert kinds == ["acquire", "commit", "release"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_fault_is_tried_again_and_given_up(s3, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 3)
    with faults_before(s3.endpoint, share=1.0, kinds=(kind,)) as proxy:
        storage = Storage(f"s3://test/{tmp_path.name}", StoreConfig.model_validate(store_behind(proxy, s3)))
        storage.fs.retries = 3
        proxy.share = 0.0
        storage.put("there", b"0123456789" * 100)
        retries.taken()
        proxy.share = 1.0
        with pytest.raises(StorageError, match=r"there: cannot (read|look for) it"):
            storage.read("there")
        assert proxy.broken[kind] >= 2
        assert retries.taken() == 2  # not again by what wraps a request that was given up
        if kind == "lost reply":  # it landed: what is there is ours
            with pytest.raises(StorageError):
                storage.create("new", b"mine")
            proxy.share = 0.0
            assert storage.create("new", b"mine")
            assert not storage.create("new", b"theirs")
        proxy.share = 0.0
        assert storage.read("there") == b"0123456789" * 100


def fetched(storage, path, copy):
    storage.fetch(path, copy)
    return copy.read_bytes()


def opened(storage, path):
    with storage.open(path) as file:
        return file.read()


@pytest.mark.parametrize("length", [100, 10_500])
def test_bodies_that_break_off_are_read_again(s3, tmp_path, monkeypatch, length):
    monkeypatch.setattr("pipeline.root.storage.RANGE_BYTES", 1000)
    monkeypatch.setattr("pipeline.root.storage.RANGES_AT_ONCE", 3)
    data = bytes(number % 251 for number in range(length))
    with faults_before(s3.endpoint, share=0.4, kinds=("truncated",)) as proxy:
        storage = Storage(f"s3://test/{tmp_path.name}", StoreConfig.model_validate(store_behind(proxy, s3)))
        monkeypatch.setattr(storage.fs, "default_block_size", 1000)  # s3fs reads what is longer in another way
        storage.put("there", data)
        for read in (storage.read, lambda path: fetched(storage, path, tmp_path / "copy"), lambda path: opened(storage, path)):
            before = proxy.broken["truncated"]
            for _ in range(5):
                assert read("there") == data
            assert proxy.broken["truncated"] > before


def test_a_refusal_is_not_tried_again(s3, tmp_path):
    wrong = {"s3": s3.store["s3"] | {"secret": "wrong"}}
    with faults_before(s3.endpoint, share=0.0) as proxy:
        wrong["s3"]["endpoint_url"] = proxy.endpoint
        storage = Storage(f"s3://test/{tmp_path.name}", StoreConfig.model_validate(wrong))
        retries.taken()
        with pytest.raises(StorageError, match=r"there: cannot write it.*credentials"):
            storage.put("there", b"x")
        assert proxy.methods.total() == 1
        assert retries.taken() == 0


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of so many bytes, or changes its size."""
    if os.getuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()

    def sized(size_bytes):
        mounted = os.path.ismount(disk)
        options = f"size={size_bytes}" + (",remount" if mounted else "")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
        return disk

    yield sized
    if os.path.ismount(disk):
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.usefixtures("alone")
def test_a_full_disk_is_one_clear_error_and_the_run_goes_on_with_more(tmp_path, small_disk):
    write_jsonl(tmp_path / "corpus" / "a.jsonl", sentences(400))
    texts = 0
    for size in (24, 200, 400, 600, 800, 1000):
        root = small_disk(size << 10)
        config = make_config(
            root / "root", tmp_path / "corpus", index={"kind": "ivfpq", "nlist": 4}, compute={"lease_ttl_s": 0.1}
        )
        try:
            reindex(config)
        except StorageError as error:
            assert str(error).startswith(str(root)), error
            assert "No space left on device" in str(error)
            assert "\n" not in str(error)
            texts += 1
        else:
            break
        assert live_artifact(Storage(config.root)) is None
        assert not list(Path(config.root).glob("artifacts/*/manifest.json"))
        assert not [path for path in Path(config.root).rglob("*") if path.name.startswith((".tmp-", ".scratch-"))]
    assert texts >= 3
    small_disk(64 << 20)
    assert reindex(config).live.counts["documents"] == 400
    assert audit(config, 100).passages == 400
