import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.embeddings import is_among, plan_contexts, plan_embedding, put_embeddings, quarantined_keys, stored_keys
from pipeline.errors import EncoderError
from pipeline.manifest import DataFile, Record
from pipeline.shards import KEY_DTYPE
from pipeline.storage import Storage


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


@settings(max_examples=300)
@given(st.lists(st.sets(st.integers(0, 30), max_size=12), max_size=5), st.integers(1, 9))
def test_plan_takes_each_key_once_in_even_units(numbers, size):
    parts = [(part(n, len(rows)), keys(sorted(rows)), np.arange(len(rows))) for n, rows in enumerate(numbers)]
    missing = list(missing_of(parts))
    total = sum(len(rows) for _, _, rows in missing)
    units = plan_embedding(iter(missing), size, total)
    by_name = {file.name: part_keys for file, part_keys, _ in parts}
    taken = []
    for unit in units:
        picked = [by_name[pick.file.name][row] for pick in unit.picks for first, end in pick.runs for row in range(first, end)]
        assert len(picked) == unit.passages <= size
        taken += picked
    assert np.sort(taken).tolist() == keys(sorted({n for rows in numbers for n in rows})).tolist()
    sizes = [unit.passages for unit in units]
    assert not sizes or (max(sizes) - min(sizes) <= 1 and len(sizes) == -(-total // size))
    assert len({unit.name for unit in units}) == len(units)


def test_plan_names_units_by_their_keys_alone():
    one = plan_embedding([(part(0, 4), keys([1, 2, 3, 4]), np.arange(4))], 10, 4)
    split = [(part(7, 2), keys([1, 3]), np.arange(2)), (part(8, 3), keys([2, 4]), np.array([0, 2]))]
    assert [unit.name for unit in one] == [unit.name for unit in plan_embedding(split, 10, 4)]


@settings(max_examples=300)
@given(
    st.lists(st.lists(st.integers(0, 9), max_size=5, unique=True), max_size=4),
    st.sets(st.integers(0, 39)),
    st.integers(1, 9),
)
def test_plan_of_contexts_keeps_each_together(documents, stored, size):
    """Context n has n % 4 + 1 passages, whose keys are scattered over the part; a document is some contexts, none twice."""
    parts, of_key = [], {}
    for number, contexts in enumerate(documents):
        rows = sorted((40 * place + context, context) for context in contexts for place in range(context % 4 + 1))
        of_key |= dict(rows)
        names = keys([context for _, context in rows])
        parts.append((part(number, len(rows)), keys([key for key, _ in rows]), np.arange(len(rows)), names))
    known = {40 * (key // 10 % 4) + key % 10 for key in stored}
    units = plan_contexts(parts, np.unique(keys(known)), size)
    by_name = {file.name: part_keys for file, part_keys, _, _ in parts}
    taken, files = [], [pick.file.name for unit in units for pick in unit.picks]
    assert files == sorted(files)  # each part is read by few units
    for unit in units:
        picked = [by_name[pick.file.name][row] for pick in unit.picks for first, end in pick.runs for row in range(first, end)]
        assert len(picked) == unit.passages <= max(size, 4)
        taken += [int.from_bytes(key[:2], "big") for key in picked]
    wanted = {context for key, context in of_key.items() if key not in known}
    assert sorted(taken) == sorted(key for key, context in of_key.items() if context in wanted)
    assert len({unit.name for unit in units}) == len(units)


def test_plan_leaves_masked_rows_out():
    (unit,) = plan_embedding([(part(0, 5), keys([1, 4, 5]), np.array([0, 3, 4]))], 10, 3)
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
    with pytest.raises(EncoderError, match="2 vectors for 2 passages, lengths 0"):
        put_embeddings(Storage(str(tmp_path)), "e", keys([1, 2]), np.zeros((2, 8), np.float32), {}, Record(unit="u", files=()))
