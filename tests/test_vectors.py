import numpy as np
import pytest

from pipeline.ann.vectors import Int8Vectors, Readahead, gather, open_vectors, to_float32, write_int8
from tests.test_index import unit_vectors


def test_int8_vectors_are_near_and_come_out_by_row(tmp_path):
    vectors = unit_vectors(40_000).astype(np.float16)
    write_int8(vectors, tmp_path / "vectors.int8")
    stored = Int8Vectors(tmp_path / "vectors.int8", 64)
    assert len(stored) == 40_000
    assert (tmp_path / "vectors.int8").stat().st_size == 40_000 * (64 + 4)
    exact = vectors.astype(np.float32)
    cosine = (exact * stored[:]).sum(axis=1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(stored[:], axis=1)
    assert cosine.min() > 0.9999
    rows = np.array([[5, 39_999], [0, 5]])
    assert stored[rows].dtype == np.float32
    assert (stored[rows] == stored[:][rows]).all()


@pytest.mark.parametrize("count", [0, 1])
def test_a_zero_vector_and_no_vector(tmp_path, count):
    vectors = np.zeros((count, 8), dtype=np.float16)
    write_int8(vectors, tmp_path / "vectors.int8")
    vectors.tofile(tmp_path / "vectors.f16")
    assert open_vectors(tmp_path / "vectors.f16", 8).shape == (count, 8)
    assert not Int8Vectors(tmp_path / "vectors.int8", 8)[:].any()
    assert len(Int8Vectors(tmp_path / "vectors.int8", 8)) == count


def test_every_finite_float16_converts_exactly():
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)].reshape(-1, 16)
    assert (to_float32(halves).view(np.uint32) == halves.astype(np.float32).view(np.uint32)).all()
    every_other = halves[::2, ::2]
    assert (to_float32(every_other) == every_other.astype(np.float32)).all()
    rows = np.array([[3, 0], [7, 7]])
    assert (gather(halves, rows) == halves[rows].astype(np.float32)).all()


@pytest.mark.parametrize("row_bytes", [68, 512, 5000])
def test_rows_are_asked_for_until_they_are_in_memory(tmp_path, row_bytes, monkeypatch):
    file = tmp_path / "rows"
    file.write_bytes(bytes(range(256)) * (row_bytes * 1000 // 256 + 1))
    readahead = Readahead(file, row_bytes)
    rows = np.array([[0, 999, -1], [7, 500, -1]])
    monkeypatch.setattr("pipeline.ann.vectors.ASKING_RESIDENT_S", 60)  # whatever the machine: the answer was quick
    with readahead.reading(rows):
        pass
    assert not readahead.is_cold
    faults = iter([100, 100, 100, 106])
    monkeypatch.setattr("pipeline.ann.vectors._major_faults", lambda: next(faults))
    for cold in (False, True):
        with readahead.reading(rows):
            pass
        assert readahead.is_cold == cold
    monkeypatch.setattr("pipeline.ann.vectors.ASKING_RESIDENT_S", 0)  # slow: the disk was busy
    with readahead.reading(rows):
        pass
    assert readahead.is_cold
