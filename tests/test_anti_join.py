"""The anti-join by ranges of keys gives what the one in memory does, whatever the range."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import layout, shards
from pipeline.anti_join import missing_passages
from pipeline.errors import StorageError
from pipeline.fingerprint import sha256
from pipeline.manifest import DataFile, Record
from pipeline.shards import KEY_DTYPE, fixed_binary, key_bounds, parquet_bytes, read_key_range
from pipeline.snapshot import Part
from pipeline.storage import Storage

FOLDER = "encoder"
KEYS = np.sort(np.frombuffer(np.random.default_rng(5).bytes(16 * 40), dtype=KEY_DTYPE))
NUMBERS = st.lists(st.integers(0, 39), max_size=14)


def put(storage, folder, numbers):
    """A file of keys, sorted as all are; equal ones may follow each other."""
    data = parquet_bytes(pa.table({"key": fixed_binary(KEYS[sorted(numbers)])}), compress=False)
    name = f"{sha256(data)[:20]}-{len(numbers)}.parquet"
    storage.create(f"{folder}/{name}", data)
    return DataFile(name=name, rows=len(numbers), size_bytes=len(data), sha256=sha256(data))


def rows_of(masked, numbers):
    return np.array([row for row in range(len(numbers)) if row in masked], dtype=np.int64)


@pytest.fixture
def small_groups(monkeypatch):
    """Row groups of three rows, so that a range is one to many of them."""
    monkeypatch.setattr(shards, "ROW_GROUP_ROWS", 3)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(st.tuples(NUMBERS, st.sets(st.integers(0, 13))), max_size=5),
    st.lists(st.tuples(NUMBERS, st.one_of(st.none(), NUMBERS)), max_size=4),
)
@pytest.mark.usefixtures("small_groups")
def test_ranges_of_keys_change_nothing(tmp_path, passages, stored):
    storage = Storage(str(tmp_path))
    parts = [
        Part(
            put(storage, layout.PASSAGES, numbers),
            np.array(sorted(row for row in masked if row < len(numbers)), dtype=np.int64),
        )
        for numbers, masked in passages
    ]
    records = [
        Record(
            unit=f"u{number}",
            files=(put(storage, FOLDER, vectors),),
            rejected=None if rejected is None else put(storage, FOLDER, rejected),
        )
        for number, (vectors, rejected) in enumerate(stored)
    ]
    known = {number for vectors, rejected in stored for number in [*vectors, *(rejected or [])]}
    expected = []
    for numbers, masked in passages:
        mask = []
        for row, number in enumerate(sorted(numbers)):
            mask.append(row not in masked and number not in known)
            known |= {number} if mask[-1] else set()
        expected.append(mask)
    for at_once in (1 << 24, 7, 1):
        found = missing_passages(storage, parts, storage, FOLDER, records, at_once)
        assert [mask.tolist() for mask in found] == expected


@pytest.mark.usefixtures("small_groups")
def test_a_range_is_the_slice_of_the_file_that_is_in_it(tmp_path):
    storage = Storage(str(tmp_path))
    file = put(storage, FOLDER, range(40))
    bounds = [None, *key_bounds(40, 8)]
    assert len(bounds) == 6
    rows = []
    for low, high in pairwise(bounds):
        first, keys = read_key_range(storage, FOLDER, file, low, high)
        assert first == len(rows)
        assert 0 < len(keys) < 40
        rows += keys.tolist()
    assert rows == KEYS.tolist()
    assert read_key_range(storage, FOLDER, put(storage, FOLDER, []), None, None)[1].tolist() == []


@pytest.mark.usefixtures("small_groups")
def test_a_range_reads_no_other_row_groups(tmp_path):
    storage = Storage(str(tmp_path))
    file = put(storage, FOLDER, range(40))
    path = tmp_path / FOLDER / file.name
    data = bytearray(path.read_bytes())
    last = pq.read_metadata(path).row_group(13).column(0)
    data[last.data_page_offset + last.total_compressed_size - 1] ^= 1
    path.write_bytes(bytes(data))
    assert len(read_key_range(storage, FOLDER, file, None, KEYS[20].ljust(16, b"\0"))[1]) == 20
    with pytest.raises(StorageError, match="delete it and its record, run again"):
        read_key_range(storage, FOLDER, file, None, None)
