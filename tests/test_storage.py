import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import s3fs
from botocore.exceptions import ClientError

from pipeline.errors import BadFileError, ConfigError, StorageError
from pipeline.ingest.listing import content_hash, list_files
from pipeline.root.manifest import put_data
from pipeline.root.retries import is_passing
from pipeline.root.shards import ROW_GROUP_ROWS, Cursor, fixed_binary, parquet_bytes, read_columns
from pipeline.root.storage import Storage, uri_scheme

NAMES = ["plain", "with space", "per%cent", "hash#tag", "question?", "ünïcode", "a+b=c&d", "quote'\""]


@pytest.fixture(params=["local", "s3"])
def storage(request, tmp_path):
    if request.param == "local":
        return Storage(str(tmp_path / "root"))
    server = request.getfixturevalue("s3")
    return Storage(f"s3://test/storage-{tmp_path.name}", server.store_config)


def test_put_read_list_and_replace(storage):
    assert storage.list("a") == []
    storage.put("a/x.json", b"one")
    storage.put("a/x.json", b"two")
    storage.put("a/y.json", b"three")
    assert storage.read("a/x.json") == b"two"
    assert storage.list("a") == ["a/x.json", "a/y.json"]
    assert storage.exists("a/x.json")
    assert not storage.exists("a/z.json")
    with storage.open("a/y.json") as file:
        file.seek(2)
        assert file.read() == b"ree"
    with pytest.raises(FileNotFoundError, match=r"a/z\.json: not found"):
        storage.read("a/z.json")


def test_create_lets_exactly_one_of_many_writers_win(storage):
    def create(number: int) -> bool:
        return storage.create("log/0", f"writer {number}".encode())

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(8)))
    assert won.count(True) == 1
    assert storage.read("log/0") == f"writer {won.index(True)}".encode()
    assert not storage.create("log/0", b"late")


def test_create_refuses_empty_objects(storage):
    with pytest.raises(ValueError, match="empty"):
        storage.create("x", b"")


def test_adopt_moves_a_local_file(storage, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.root.storage.RANGE_BYTES", 7000)
    file, data = tmp_path / "made", bytes(number % 251 for number in range(100_000))
    file.write_bytes(data)
    storage.adopt("folder/kept", file)
    assert not file.exists()
    assert storage.read("folder/kept") == data
    storage.fetch("folder/kept", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data


def test_local_writes_leave_no_temporary_files(tmp_path):
    storage = Storage(str(tmp_path))
    storage.put("a", b"1")
    storage.create("b", b"2")
    storage.create("b", b"3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("name", NAMES)
def test_names_survive_the_round_trip(storage, name):
    storage.put(f"in/{name}.txt", b"content")
    assert storage.list("in") == [f"in/{name}.txt"]
    files = list_files(storage.at("in"), storage._store)
    assert [file.uri for file in files] == [storage.at(f"in/{name}.txt")]
    folder, _, base = files[0].uri.rpartition("/")
    assert Storage(folder, storage._store).read(base) == b"content"


def test_list_files_tells_hidden_files_and_takes_files_and_globs(storage):
    for path in ("c/a.txt", "c/deep/b.txt", "c/_SUCCESS", "c/.a.crc", "c/_temporary/x.txt"):
        storage.put(path, b"x")
    found = {file.uri.removeprefix(storage.uri): file.hidden for file in list_files(storage.at("c"), storage._store)}
    assert [path for path, hidden in found.items() if not hidden] == ["/c/a.txt", "/c/deep/b.txt"]
    assert [path for path, hidden in found.items() if hidden] == ["/c/.a.crc", "/c/_SUCCESS", "/c/_temporary/x.txt"]
    assert len(list_files(storage.at("c/*.txt"), storage._store)) == 1
    assert len(list_files(storage.at("c/deep/b.txt"), storage._store)) == 1


def test_content_hash_follows_content(storage):
    storage.put("f", b"one")
    first = content_hash(list_files(storage.at("f"), storage._store)[0])
    storage.put("f", b"one")
    assert content_hash(list_files(storage.at("f"), storage._store)[0]) == first
    storage.put("f", b"two")
    assert content_hash(list_files(storage.at("f"), storage._store)[0]) != first


def test_nothing_there_names_the_nearest_folder(tmp_path):
    with pytest.raises(ConfigError, match=f"nearest folder that exists is {tmp_path}"):
        list_files(str(tmp_path / "nope" / "deeper"), Storage(str(tmp_path))._store)


@pytest.mark.parametrize("uri", ["ssh://host/x", "simplecache::s3://b/x", "http://x/y", "github://a/b"])
def test_other_schemes_are_refused(uri):
    with pytest.raises(ConfigError, match="not supported"):
        uri_scheme(uri)


def test_an_endpoint_where_nobody_answers_is_one_clear_error(s3, monkeypatch):
    monkeypatch.setattr("pipeline.root.retries.ATTEMPTS", 2)  # of 16: two minutes
    store = s3.store_config.model_copy(
        update={"s3": s3.store_config.s3.model_copy(update={"endpoint_url": "http://127.0.0.1:9"})}
    )
    with pytest.raises(StorageError, match="s3://test/x/a: cannot write it"):
        Storage("s3://test/x", store).put("a", b"1")
    monkeypatch.undo()
    Storage("s3://test/x", s3.store_config)  # and all S3 storages try as often as ever


def test_a_single_file_below_a_hidden_folder_is_input(storage):
    storage.put(".cache/_exports/a.jsonl", b"x")
    assert len(list_files(storage.at(".cache/_exports/a.jsonl"), storage._store)) == 1


def test_create_that_landed_but_lost_its_answer_is_told_from_a_lost_race(s3, tmp_path):
    storage = Storage(f"s3://test/lost-{tmp_path.name}", s3.store_config)
    assert storage.create("x", b"mine")
    assert storage.create("x", b"mine")  # the retry of a client that did not hear the answer
    assert not storage.create("x", b"other")


@pytest.mark.parametrize("name", ["lost+found", ".Trash-0", "gone"])
def test_a_folder_that_cannot_be_read_is_an_error_not_an_empty_one(tmp_path, monkeypatch, name):
    for file in ("a/x.txt", "b/y.txt"):
        Storage(str(tmp_path)).put(file, b"x")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/gone"):
            raise FileNotFoundError(2, "No such file", str(path))
        if str(path).endswith(("/b", "/lost+found", "/.Trash-0")):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StorageError, match=rf"cannot list it, .*Permission denied: '{tmp_path}/b'"):
        list_files(str(tmp_path), Storage(str(tmp_path))._store)
    (tmp_path / "b").rename(tmp_path / name)
    assert [file.uri for file in list_files(str(tmp_path), Storage(str(tmp_path))._store)] == [f"{tmp_path}/a/x.txt"]


def test_a_file_that_goes_while_files_are_listed_or_hashed(tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt"):
        Storage(str(tmp_path)).put(name, b"x")
    (kept, gone), walk = list_files(str(tmp_path), Storage(str(tmp_path))._store), os.walk

    def late(folder, **options):
        found = list(walk(folder, **options))
        Path(gone.uri).unlink()
        return found

    monkeypatch.setattr(os, "walk", late)
    assert list_files(str(tmp_path), Storage(str(tmp_path))._store) == [kept]
    with pytest.raises(BadFileError, match=r"b\.txt: E_INPUT_CHANGED, it is gone"):
        content_hash(gone)


def test_a_file_that_is_read_forward_beside_others_keeps_little_of_itself(s3, tmp_path, monkeypatch):
    storage, rows, fetched = Storage(f"s3://test/{tmp_path.name}", s3.store_config), 4 * ROW_GROUP_ROWS, []
    columns = {
        "key": fixed_binary(np.arange(rows, dtype=">u8").repeat(2).view("S16")),
        "row": fixed_binary(np.zeros((rows, 500), np.int8)),
    }
    file = put_data(storage, "e/u", ".parquet", parquet_bytes(pa.table(columns), compress=False), rows)
    fetch = s3fs.core.S3File._fetch_range
    monkeypatch.setattr(s3fs.core.S3File, "_fetch_range", lambda self, *ends: fetched.append(ends) or fetch(self, *ends))
    cursor = Cursor(storage, "e", file, ["key", "row"], ahead_bytes=100_000)
    fetched.clear()
    assert [sum(table.num_rows for table in cursor.take(ROW_GROUP_ROWS)) for _ in range(5)] == [ROW_GROUP_ROWS] * 4 + [0]
    assert cursor._parquet.closed
    assert max(end - start for start, end in fetched) <= file.size_bytes / 4 + 100_000
    assert sum(end - start for start, end in fetched) <= 1.3 * file.size_bytes
    fetched.clear()
    assert len(read_columns(storage, "e", file, ["key", "row"])) == rows
    assert max(end - start for start, end in fetched) > file.size_bytes / 2, "one file alone is read at once"


@pytest.mark.parametrize("landed", [True, False])
def test_an_upload_whose_last_answer_was_lost_has_landed_or_not(s3, tmp_path, monkeypatch, landed):
    storage, file = Storage(f"s3://test/{tmp_path.name}", s3.store_config), tmp_path / "made"
    file.write_bytes(b"x" * 1000)
    put_file = storage.fs.put_file

    def lost(local, uri):
        if landed:
            put_file(local, uri)
        raise FileNotFoundError("The specified upload does not exist")

    monkeypatch.setattr(storage.fs, "put_file", lost)
    if landed:
        storage.adopt("kept", file)
        assert storage.size("kept") == 1000 and not file.exists()
    else:
        with pytest.raises(StorageError, match="kept: cannot write it"):
            storage.adopt("kept", file)


def test_a_conflict_of_two_who_create_is_asked_again_and_a_refusal_is_not():
    def answer(status, code):
        return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")

    assert is_passing(answer(409, "ConditionalRequestConflict"))
    assert is_passing(answer(409, "OperationAborted"))
    assert not is_passing(answer(412, "PreconditionFailed"))
