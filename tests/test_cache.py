"""Copies of remote artifacts: made once, kept while they are open, removed when room is short."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.artifacts.cache import _size
from pipeline.artifacts.live import open_share, open_uri
from pipeline.config import SearchConfig
from pipeline.errors import StorageError, VerificationError
from pipeline.root.storage import Storage
from pipeline.run import reindex
from pipeline.search.searcher import Ask, Queries, Searcher
from tests.conftest import make_config, sentences, write_jsonl
from tests.faults.alone import alone as alone  # a fixture

pytestmark = pytest.mark.usefixtures("alone")

HOME = Path(__file__).parent.parent


@pytest.fixture
def artifacts(tmp_path):
    """URIs of three artifacts on a storage that is not local."""
    uris = []
    for number in range(3):
        write_jsonl(tmp_path / f"{number}.jsonl", sentences(30, start=30 * number))
        live = reindex(make_config(tmp_path / f"root{number}", tmp_path / f"{number}.jsonl", index={"kind": "flat"})).live
        remote = Storage(f"memory://{tmp_path.name}/{number}")
        for file in (tmp_path / f"root{number}" / "artifacts" / live.version).iterdir():
            remote.put(file.name, file.read_bytes())
        uris.append(remote.uri)
    return uris


def copies(cache):
    return sorted(path.name for path in cache.iterdir())


def size(cache):
    return sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())


def test_a_copy_is_made_once_and_is_whole(tmp_path, artifacts, monkeypatch):
    search = SearchConfig(cache_dir=str(tmp_path / "cache"))
    one = open_uri(artifacts[0], search)
    monkeypatch.setattr(Storage, "fetch", None)
    two = open_uri(artifacts[0], search)
    assert len(copies(tmp_path / "cache")) == 2  # the copy and its lock
    answers = [opened.searcher.search(opened.partition.collection.vectors[:3].astype("float32"), 3) for opened in (one, two)]
    assert answers[0] == answers[1]


def test_the_longest_unused_go_but_none_that_is_open(tmp_path, artifacts):
    cache = tmp_path / "cache"
    first = open_uri(artifacts[0], SearchConfig(cache_dir=str(cache)))
    (held, _) = copies(cache)
    room = int(2.5 * size(cache))
    small = SearchConfig(cache_dir=str(cache), cache_size=room)
    open_uri(artifacts[1], small)
    gc.collect()
    both = set(copies(cache))
    assert len(both) == 4
    open_uri(artifacts[2], small)
    gc.collect()
    left = set(copies(cache))
    assert len(left) == 4 and held in left, "the first is the longest unused, and open"
    assert size(cache) <= room
    del first
    gc.collect()
    open_uri(artifacts[1], small)
    assert held not in copies(cache)
    assert len(copies(cache)) == 4


def test_one_that_is_larger_than_all_the_room_is_kept(tmp_path, artifacts):
    search = SearchConfig(cache_dir=str(tmp_path / "cache"), cache_size=1)
    opened = open_uri(artifacts[0], search)
    assert len(opened.searcher.search(opened.partition.collection.vectors[:1].astype("float32"), 3)[0]) == 3
    assert len(copies(tmp_path / "cache")) == 2


def test_what_a_killed_process_left_is_no_copy(tmp_path, artifacts):
    cache = tmp_path / "cache"
    open_uri(artifacts[0], SearchConfig(cache_dir=str(cache)))
    gc.collect()
    (name, lock) = copies(cache)
    (cache / name).rename(cache / f".tmp-{name}")
    next(file for file in (cache / f".tmp-{name}").iterdir() if file.name == "vectors.f16").write_bytes(b"torn")
    opened = open_uri(artifacts[0], SearchConfig(cache_dir=str(cache)))
    assert copies(cache) == [name, lock]
    assert opened.partition.collection.vectors.shape[0] == 30


def test_a_damaged_or_missing_file_is_named_and_nothing_is_kept(tmp_path, artifacts):
    cache = tmp_path / "cache"
    remote = Storage(artifacts[0])
    data = bytearray(remote.read("vectors.f16"))
    data[7] ^= 1
    remote.put("vectors.f16", bytes(data))
    with pytest.raises(VerificationError, match=r"vectors\.f16: its bytes are not those of the manifest"):
        open_uri(artifacts[0], SearchConfig(cache_dir=str(cache)))
    remote.delete("vectors.f16")
    with pytest.raises(VerificationError, match=r"vectors\.f16: not found; the manifest lists it"):
        open_uri(artifacts[0], SearchConfig(cache_dir=str(cache)))
    assert [name for name in copies(cache) if not name.endswith(".lock")] == []


def test_a_cache_that_cannot_be_written_says_what_to_set(tmp_path, artifacts):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"cannot be written, .*; set search\.cache_dir"):
        open_uri(artifacts[0], SearchConfig(cache_dir=str(tmp_path / "file")))


@pytest.fixture
def two_parts(tmp_path):
    """An artifact with two index files and int8 vectors, on a storage that is not local."""
    write_jsonl(tmp_path / "a.jsonl", sentences(1200))
    index = {"kind": "ivfsq8", "nlist": 8, "partitions": 2, "rescore": "int8", "lexical": True}
    live = reindex(make_config(tmp_path / "root", tmp_path / "a.jsonl", index=index)).live
    here, remote = tmp_path / "root" / "artifacts" / live.version, Storage(f"memory://{tmp_path.name}/two")
    for file in here.rglob("*.*"):
        remote.put(file.relative_to(here).as_posix(), file.read_bytes())
    return remote


def test_a_share_is_copied_without_what_is_not_its_own(tmp_path, two_parts):
    search = SearchConfig(cache_dir=str(tmp_path / "cache"))
    whole = open_uri(two_parts.uri, SearchConfig(cache_dir=str(tmp_path / "whole")))
    shares = [open_share(two_parts, "", search, number, 2) for number in range(2)]
    for number, share in enumerate(shares):
        held = share.partition.ordinals
        (folder,) = (tmp_path / "cache").glob(f"*-{held.start}-{held.stop}")
        assert [path.name for path in folder.glob("index*")] == [f"index-000{number}.faiss"]
        for name, kind in (("vectors.f16", np.uint16), ("vectors.int8", np.uint8)):
            kept, full = (np.fromfile(path / name, kind).reshape(1200, -1) for path in (folder, whole_folder(tmp_path)))
            assert len(kept) == len(full)
            mine = np.isin(np.arange(1200), held)
            assert (kept[mine] == full[mine]).all()
            assert not kept[~mine].any()
        taken = sum(file.stat().st_blocks * 512 for file in folder.glob("vectors*"))
        assert taken < 0.6 * sum(file.stat().st_size for file in folder.glob("vectors*"))
        assert _size(folder) < _size(whole_folder(tmp_path))
    searcher = Searcher([share.partition for share in shares], whole.manifest, whole.searcher.point)
    queries = Queries(whole.partition.collection.vectors[::50].astype(np.float32), [row["text"] for row in sentences(24)])
    for mode in ("lexical", "dense"):
        found, expected = (each.ask(queries, Ask(5, mode=mode)) for each in (searcher, whole.searcher))
        same = [
            text.text == other.text for texts in zip(found, expected, strict=True) for text, other in zip(*texts, strict=True)
        ]
        assert np.mean(same) >= 0.99


def whole_folder(tmp_path):
    (folder,) = (path for path in (tmp_path / "whole").iterdir() if path.is_dir())
    return folder


@pytest.mark.parametrize("row", [3, 1190])
def test_of_a_share_the_whole_of_the_vectors_is_verified(tmp_path, two_parts, row):
    data = bytearray(two_parts.read("vectors.f16"))
    data[row * 768] ^= 1
    two_parts.put("vectors.f16", bytes(data))
    with pytest.raises(VerificationError, match=r"vectors\.f16: its bytes are not"):
        open_share(two_parts, "", SearchConfig(cache_dir=str(tmp_path / "cache")), 0, 2)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


READER = """
import sys
from pipeline.config import SearchConfig, StoreConfig
from pipeline.artifacts.live import open_uri
import json
uri, cache, size, store = sys.argv[1:]
for _ in range(8):
    for number in (0, 1, 2):
        search = SearchConfig(cache_dir=cache, cache_size=int(size))
        opened = open_uri(f"{uri}/{number}", search, StoreConfig.model_validate(json.loads(store)))
        vectors = opened.partition.collection.vectors[:5].astype("float32")
        assert [hits[0].score > 0.999 for hits in opened.searcher.search(vectors, 1)] == [True] * 5
"""


@pytest.mark.timeout(200)
def test_processes_that_push_each_other_out_all_find_what_they_open(tmp_path, artifacts, s3):
    bucket = Storage(f"s3://test/{tmp_path.name}", s3.store_config)
    for number, uri in enumerate(artifacts):
        for path in Storage(uri).list(""):
            bucket.put(f"{number}{path}", Storage(uri).read(path.lstrip("/")))
    room = 2 * sum(file.size_bytes for file in bucket.walk("0"))
    command = [sys.executable, "-c", READER, bucket.uri, str(tmp_path / "cache"), str(room), json.dumps(s3.store)]
    readers = [subprocess.Popen(command, cwd=HOME, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for reader in readers:
        _, errors = reader.communicate(timeout=150)
        assert reader.returncode == 0, errors[-2000:]


def test_a_copy_without_a_lock_is_the_first_to_go(tmp_path, artifacts):
    stray = tmp_path / "cache" / "0123456789abcdef"
    stray.mkdir(parents=True)
    (stray / "vectors.f16").write_bytes(b"x" * 1000)
    open_uri(artifacts[0], SearchConfig(cache_dir=str(tmp_path / "cache"), cache_size=1))
    assert stray.name not in copies(tmp_path / "cache")
    assert len(copies(tmp_path / "cache")) == 2


def test_sizes_of_a_folder_that_another_process_removes_are_none(tmp_path):
    assert _size(tmp_path / "gone") == 0
