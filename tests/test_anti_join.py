"""The anti-join by ranges of keys gives what one over sets does, whatever the range, and holds little of it."""

import tracemalloc

import numpy as np
import pyarrow as pa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.embed.anti_join import missing_passages, missing_rows
from pipeline.fingerprint import sha256
from pipeline.ingest.snapshot import Part
from pipeline.root import layout
from pipeline.root.manifest import DataFile, Record
from pipeline.root.shards import KEY_DTYPE, fixed_binary, parquet_bytes
from pipeline.root.storage import Storage

FOLDER = "encoder"
KEYS = np.sort(np.frombuffer(np.random.default_rng(5).bytes(16 * 40), dtype=KEY_DTYPE))
NUMBERS = st.lists(st.integers(0, 39), max_size=14)
NONE = np.empty(0, dtype=np.int64)


def put(storage, folder, keys):
    """A file of keys, sorted as all are; equal ones may follow each other."""
    data = parquet_bytes(pa.table({"key": fixed_binary(np.sort(keys))}), compress=False)
    name = f"{sha256(data)[:20]}-{len(keys)}.parquet"
    storage.create(f"{folder}/{name}", data)
    return DataFile(name=name, rows=len(keys), size_bytes=len(data), sha256=sha256(data))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(st.tuples(NUMBERS, st.sets(st.integers(0, 13))), max_size=5),
    st.lists(st.tuples(NUMBERS, st.one_of(st.none(), NUMBERS)), max_size=4),
)
def test_ranges_of_keys_change_nothing(tmp_path, passages, stored):
    storage = Storage(str(tmp_path))
    parts, expected = [], []
    records = [
        Record(
            unit=f"u{number}",
            files=(put(storage, FOLDER, KEYS[vectors]),),
            rejected=None if rejected is None else put(storage, FOLDER, KEYS[rejected]),
        )
        for number, (vectors, rejected) in enumerate(stored)
    ]
    known = {number for vectors, rejected in stored for number in [*vectors, *(rejected or [])]}
    for numbers, masked in passages:
        rows = [row for row in range(len(numbers)) if row in masked]
        parts.append(Part(put(storage, layout.PASSAGES, KEYS[numbers]), np.array(rows, dtype=np.int64)))
        mask = []
        for row, number in enumerate(sorted(numbers)):
            mask.append(row not in masked and number not in known)
            known |= {number} if mask[-1] else set()
        expected.append(mask)
    for at_once in (1 << 24, 7, 1):
        found = missing_passages(storage, parts, storage, FOLDER, records, keys_at_once=at_once)
        assert [mask.tolist() for mask in found] == expected
    rows = [(file.name, picked.tolist()) for file, _, picked in missing_rows(storage, parts, found, late=False)]
    assert rows == [
        (part.file.name, np.flatnonzero(mask).tolist()) for part, mask in zip(parts, expected, strict=True) if any(mask)
    ]


def test_memory_is_that_of_a_range(tmp_path):
    storage, rng = Storage(str(tmp_path)), np.random.default_rng(7)
    size, files = 2000, 100
    keys = np.frombuffer(rng.bytes(16 * size * files), dtype=KEY_DTYPE)
    parts = [Part(put(storage, layout.PASSAGES, keys[number::files]), NONE) for number in range(files)]
    records = [Record(unit=f"u{number}", files=(put(storage, FOLDER, keys[number::files]),)) for number in range(files)]

    def peak(at_once):
        tracemalloc.start()
        found = missing_passages(storage, parts, storage, FOLDER, records, keys_at_once=at_once)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert not any(mask.any() for mask in found)
        return peak

    peak(10_000)  # what is imported and kept by then is no part of it
    whole, parted = peak(1 << 24), peak(10_000)
    assert whole > 16 * 2 * size * files
    assert parted < whole / 4
