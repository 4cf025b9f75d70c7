import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.embed.embeddings import (
    even_size,
    is_among,
    plan_embedding,
    put_embeddings,
    quarantined_keys,
    stored_keys,
    whole_contexts,
)
from pipeline.errors import EncoderError
from pipeline.root.manifest import DataFile, Record
from pipeline.root.shards import KEY_DTYPE
from pipeline.root.storage import Storage


def keys(numbers):
    return np.array([number.to_bytes(2, "big") + b"\x00" * 13 + b"\x01" for number in numbers], dtype=KEY_DTYPE)


def part(number, rows):
    return DataFile(name=f"p{number}", rows=rows, size_bytes=1, sha256="0")


def missing_of(parts):
    """Each part's first occurrences, as an anti-join gives them."""
    seen = set()
    for file, part_keys, rows in parts:
        new = [place for place, key in enumerate(part_keys.tolist()) if not (key in seen or seen.add(key))]
        yield file, part_keys[new], rows[new]


def picked(unit, by_name):
    return [by_name[pick.file.name][row] for pick in unit.picks for first, end in pick.runs for row in range(first, end)]


@settings(max_examples=300)
@given(st.lists(st.sets(st.integers(0, 30), max_size=12), max_size=5), st.integers(1, 9))
def test_plan_takes_each_key_once_in_even_units(numbers, most):
    parts = [(part(n, len(rows)), keys(sorted(rows)), np.arange(len(rows))) for n, rows in enumerate(numbers)]
    missing = list(missing_of(parts))
    total = sum(len(rows) for _, _, rows in missing)
    units = plan_embedding(iter(missing), size := even_size(total, most))
    by_name = {file.name: part_keys for file, part_keys, _ in parts}
    taken = []
    for unit in units:
        own = picked(unit, by_name)
        assert len(own) == unit.passages <= most
        taken += own
    assert np.sort(taken).tolist() == keys(sorted({n for rows in numbers for n in rows})).tolist()
    assert [unit.passages for unit in units[:-1]] == [size] * (len(units) - 1)
    assert len(units) == -(-total // most)
    assert len({unit.name for unit in units}) == len(units)


def test_plan_names_units_by_their_keys_alone():
    one = plan_embedding([(part(0, 4), keys([1, 2, 3, 4]), np.arange(4))], 10)
    split = [(part(7, 2), keys([1, 3]), np.arange(2)), (part(8, 3), keys([2, 4]), np.array([0, 2]))]
    assert [unit.name for unit in one] == [unit.name for unit in plan_embedding(split, 10)]


def in_context(context, place):
    return context.to_bytes(10, "big") + place.to_bytes(2, "big") + b"text"


@settings(max_examples=300)
@given(
    st.lists(st.lists(st.integers(0, 9), max_size=5, unique=True), max_size=4),
    st.sets(st.tuples(st.integers(0, 9), st.integers(0, 3))),
    st.integers(1, 9),
)
def test_plan_of_late_chunking_keeps_contexts_whole(documents, stored, size):
    """Context n has n % 4 + 1 passages; a document is some contexts, none twice; parts may share contexts."""
    known = {in_context(*each) for each in stored}
    parts, missing, seen = [], [], set()
    for number, contexts in enumerate(documents):
        rows = [in_context(context, place) for context in sorted(contexts) for place in range(context % 4 + 1)]
        own = np.array(rows, dtype=KEY_DTYPE)
        mask = np.array([key not in known and key not in seen for key in rows], dtype=bool)
        seen |= {*rows}
        parts.append((f"p{number}", own))
        whole = whole_contexts(own, np.arange(len(own)), mask)
        missing.append((part(number, len(rows)), own[whole], np.flatnonzero(whole)))
    units = plan_embedding(missing, size, late=True)
    taken = []
    for unit in units:
        own = [bytes(key).ljust(16, b"\0") for key in picked(unit, dict(parts))]
        assert len(own) == unit.passages <= size + 3
        assert unit.late
        whole = {(key[:10], place) for key in own for place in range(int.from_bytes(key[:10], "big") % 4 + 1)}
        assert {(key[:10], int.from_bytes(key[10:12], "big")) for key in own} == whole
        taken += own
    wanted = {key[:10] for key in seen - known}
    assert sorted(taken) == sorted(key for key in seen if key[:10] in wanted)


def test_a_context_is_whole_but_for_rows_that_do_not_count():
    rows = [in_context(1, 0), in_context(1, 0), in_context(1, 1), in_context(1, 1), in_context(2, 0)]
    kept, missing = np.array([1, 2, 3, 4]), np.array([False, False, True, False, False])
    assert whole_contexts(np.array(rows, dtype=KEY_DTYPE), kept, missing).tolist() == [False, True, True, False, False]


def test_plan_leaves_masked_rows_out():
    (unit,) = plan_embedding([(part(0, 5), keys([1, 4, 5]), np.array([0, 3, 4]))], 10)
    assert (unit.passages, unit.picks[0].runs) == (3, ((0, 1), (3, 5)))


@pytest.mark.parametrize(("known", "expected"), [([], [False, False]), ([1], [True, False]), ([0, 1, 2], [True, True])])
def test_is_among(known, expected):
    assert is_among(keys([1, 2]), np.sort(keys(known))).tolist() == expected


@pytest.mark.parametrize("failed", [{}, {1: "E_A: not finite"}, {0: "E_A: a: b", 1: "E_B: b", 2: "E_C: c"}])
def test_vectors_and_quarantined_are_the_passages(tmp_path, failed):
    storage = Storage(str(tmp_path))
    vectors = np.eye(3, 8, dtype=np.float32)
    vectors[list(failed)] = np.nan
    record = put_embeddings(storage, "e", keys([1, 2, 3]), vectors, failed, Record(unit="u", files=(), counts={"tokens": 9}))
    assert record.counts == {"tokens": 9, "passages": 3 - len(failed), "rejected": len(failed)}
    stored, rejected = stored_keys(storage, "e", [record]), quarantined_keys(storage, "e", [record])
    assert rejected.tolist() == keys([1, 2, 3])[sorted(failed)].tolist()
    assert np.union1d(stored, rejected).tolist() == keys([1, 2, 3]).tolist()
    again = put_embeddings(storage, "e", keys([2, 7]), np.eye(2, 8, dtype=np.float32), {}, Record(unit="v", files=()))
    assert keys([2])[0] not in quarantined_keys(storage, "e", [record, again])


def test_a_vector_that_is_none_is_refused(tmp_path):
    with pytest.raises(EncoderError, match=r"unit u: vectors of lengths 0\.0 to 0\.0, expected 1"):
        put_embeddings(Storage(str(tmp_path)), "e", keys([1, 2]), np.zeros((2, 8), np.float32), {}, Record(unit="u", files=()))
