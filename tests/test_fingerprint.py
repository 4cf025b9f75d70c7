import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.fingerprint import canonical_json, fingerprint

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), PLAIN))
def test_fingerprint_ignores_the_order_of_keys(value):
    assert fingerprint(value) == fingerprint(dict(reversed(value.items())))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: 2}, {"a": {1}}, [object()], b"x"])
def test_fingerprint_refuses_values_without_a_stable_form(value):
    with pytest.raises(TypeError, match="stable"):
        fingerprint(value)


def test_fingerprint_tells_values_apart():
    values = [None, 0, False, "", "0", [], [[]], {}, {"a": None}, {"a": 0}, 0.5, "é", "e\u0301"]
    assert len({fingerprint(value) for value in values}) == len(values)
    assert canonical_json({"b": 1, "a": [True, None]}) == b'{"a":[true,null],"b":1}'
