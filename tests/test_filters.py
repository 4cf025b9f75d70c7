import json
import operator

import hypothesis
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.search.filters import Metadata, parse_filter, write_metadata

COLUMNS = ("year", "lang", "done")
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([0.5, -1.5, 1e300, 10**400]),
    st.sampled_from(["", "a", "b", "ä"]),
)
SCALARS = VALUES.filter(lambda value: value is not None)
ORDER = {"gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}


def comparisons():
    keys = st.sampled_from(COLUMNS)
    one = st.fixed_dictionaries({"type": st.sampled_from(["eq", "ne"]), "key": keys, "value": SCALARS})
    ranges = st.fixed_dictionaries(
        {"type": st.sampled_from(list(ORDER)), "key": keys, "value": SCALARS.filter(lambda value: not isinstance(value, bool))}
    )
    many = st.fixed_dictionaries(
        {"type": st.sampled_from(["in", "nin"]), "key": keys, "value": st.lists(SCALARS, min_size=1, max_size=4)}
    )
    return one | ranges | many


FILTERS = st.recursive(
    comparisons(),
    lambda inner: st.fixed_dictionaries(
        {"type": st.sampled_from(["and", "or"]), "filters": st.lists(inner, min_size=1, max_size=3)}
    ),
    max_leaves=6,
)


def kind(value):
    return bool if isinstance(value, bool) else float if isinstance(value, int | float) else type(value)


def as_number(value):
    return float("inf") if value == 10**400 else value


def equal(one, other):
    return kind(one) is kind(other) and as_number(one) == as_number(other)


def passes(row, wanted):
    """The same in plain Python."""
    how = wanted["type"]
    if how in {"and", "or"}:
        return (all if how == "and" else any)(passes(row, each) for each in wanted["filters"])
    found, value = row.get(wanted["key"]), wanted["value"]
    if how in {"in", "nin"}:
        return any(equal(found, each) for each in value) == (how == "in")
    if how in {"eq", "ne"}:
        return equal(found, value) == (how == "eq")
    return kind(found) is kind(value) and ORDER[how](as_number(found), as_number(value))


def written(folder, rows, batch=2):
    """Each row is a document; documents 0, 1 and 2 share a text, the others have one each."""
    ordinals = [max(0, number - 2) for number in range(len(rows))]
    table = pa.table({"ordinal": ordinals, "metadata": [json.dumps(row) if row is not None else None for row in rows]})
    write_metadata(iter(table.to_batches(max_chunksize=batch)), COLUMNS, folder / "metadata.arrow")
    return Metadata(folder / "metadata.arrow", COLUMNS)


@hypothesis.given(
    rows=st.lists(st.none() | st.dictionaries(st.sampled_from(COLUMNS), VALUES), min_size=3, max_size=9), wanted=FILTERS
)
@hypothesis.settings(max_examples=300, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_a_filter_means_what_it_means_in_python(tmp_path, rows, wanted):
    metadata = written(tmp_path, rows)
    passing = metadata.passing(parse_filter(json.dumps(wanted)), len(rows) - 2)
    expected = [passes(row or {}, wanted) for row in rows]
    assert passing.documents(0).tolist() == expected[:3]
    assert passing.ordinals.tolist() == [any(expected[:3]), *expected[3:]]
    assert passing.count == int(passing.ordinals.sum())


def test_lists_and_objects_are_equal_to_nothing(tmp_path):
    metadata = written(tmp_path, [{"lang": ["a"]}, {"lang": {"a": 1}}, {"lang": "a"}])
    assert metadata.passing(parse_filter({"type": "eq", "key": "lang", "value": "a"}), 1).documents(0).tolist() == [
        False,
        False,
        True,
    ]
    assert metadata.passing(parse_filter({"type": "ne", "key": "lang", "value": "a"}), 1).documents(0).tolist() == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("{", "Invalid JSON"),
        ({"type": "like", "key": "year", "value": 1}, "does not match any of the expected tags"),
        ({"type": "eq", "key": "year"}, "Field required"),
        ({"type": "eq", "key": "year", "value": None}, "expected a text, a number"),
        ({"type": "eq", "key": "year", "value": float("nan")}, "finite"),
        ({"type": "eq", "key": "year", "value": "\ud800"}, "surrogate"),
        ({"type": "in", "key": "year", "value": []}, "at least 1 item"),
        ({"type": "and", "filters": []}, "at least 1 item"),
        ({"type": "eq", "key": "year", "value": 1, "boost": 2}, "Extra inputs"),
    ],
)
def test_a_wrong_filter_says_what_is_wrong(wanted, message):
    with pytest.raises(ConfigError, match=message) as found:
        parse_filter(wanted)
    assert "expected such as" in str(found.value)


def test_what_the_columns_cannot_answer_is_refused(tmp_path):
    metadata = written(tmp_path, [{}] * 3)
    with pytest.raises(ConfigError, match=r"wordcount is no column of corpus.metadata \(year, lang, done\)"):
        metadata.passing(parse_filter({"type": "eq", "key": "wordcount", "value": 1}), 1)
    with pytest.raises(ConfigError, match="gt true: truth values have no order"):
        metadata.passing(parse_filter({"type": "gt", "key": "done", "value": True}), 1)
    deep = {"type": "eq", "key": "year", "value": 1}
    for _ in range(9):
        deep = {"type": "or", "filters": [deep]}
    with pytest.raises(ConfigError, match="nested more than 8 deep"):
        metadata.passing(parse_filter(deep), 1)


def test_of_many_rows_only_the_ordinals_are_held_in_memory(tmp_path):
    metadata = written(tmp_path, [{"year": number, "lang": "a"} for number in range(100_000)], batch=8192)
    passing = metadata.passing(parse_filter({"type": "lt", "key": "year", "value": 12}), 99_998)
    assert np.flatnonzero(passing.ordinals).tolist() == list(range(10))
    assert (tmp_path / "metadata.arrow").stat().st_size > 4_000_000
    assert pa.total_allocated_bytes() < 100_000 * 8 + 200_000
