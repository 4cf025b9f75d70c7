import numpy as np

from pipeline.embed.tokenized import NO_SPANS, TokenizedUnit
from pipeline.encoding.unit_vectors import mean_of_windows

ROWS = [np.arange(10 * row, 10 * row + 3 + row, dtype=np.int32) for row in range(6)]


def unit(windows):
    lengths = np.array([len(row) for row in ROWS], dtype=np.int32)
    keys = np.array([f"key {number}" for number in range(len(windows))], dtype="S16")
    return TokenizedUnit("u", keys, np.concatenate(ROWS), lengths, np.array(windows, dtype=np.int32), NO_SPANS, {"read": 1.0})


def test_a_unit_travels_as_bytes():
    here = unit([2, 1, 3])
    assert len(here.tokens) == len(ROWS)  # known by now, and no part of what travels
    row = here.as_row()
    assert {type(value) for value in row.values()} == {str, bytes, dict}
    there = TokenizedUnit.of(row)
    assert [row.tolist() for row in there.tokens] == [row.tolist() for row in ROWS]
    assert (there.name, there.windows.tolist(), there.timings_s) == ("u", [2, 1, 3], {"read": 1.0})
    assert there.keys.tolist() == [b"key 0", b"key 1", b"key 2"]


def test_a_piece_has_the_windows_of_its_passages():
    whole = unit([2, 1, 3])
    for passages, rows in ((range(1, 3), [2, 3, 4, 5]), ([0, 2], [0, 1, 3, 4, 5]), (range(1), [0, 1])):
        piece = TokenizedUnit.of(whole.piece(passages).as_row())
        assert [row.tolist() for row in piece.tokens] == [ROWS[row].tolist() for row in rows]
        assert piece.keys.tolist() == whole.keys[list(passages)].tolist()
        assert piece.windows.tolist() == whole.windows[list(passages)].tolist()


def test_vectors_of_pieces_are_those_of_the_whole():
    vectors = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    windows = np.array([2, 1, 3])
    means, failed = mean_of_windows(vectors, {4: "E_CRASH: 9 tokens"}, windows)
    parts = [
        mean_of_windows(vectors[first:end], {}, windows[number : number + 1])[0]
        for number, (first, end) in enumerate([(0, 2), (2, 3), (3, 6)])
    ]
    assert np.allclose(means, np.concatenate(parts))
    assert failed == {2: "E_CRASH: 9 tokens"}


def test_a_piece_of_contexts_has_the_rows_of_its_passages():
    spans = np.array([[0, 0, 3], [3, 0, 2], [3, 2, 6], [1, 0, 4]], dtype=np.int32)
    keys = np.array([f"key {number}" for number in range(4)], dtype="S16")
    lengths = np.array([len(row) for row in ROWS], dtype=np.int32)
    whole = TokenizedUnit("u", keys, np.concatenate(ROWS), lengths, np.ones(4, dtype=np.int32), spans, {})
    assert whole.together == [[0], [3], [1, 2]]
    piece = TokenizedUnit.of(whole.piece([1, 2]).as_row())
    assert [row.tolist() for row in piece.tokens] == [ROWS[3].tolist()]
    assert piece.spans.tolist() == [[0, 0, 2], [0, 2, 6]]
    assert unit([2, 1, 3]).together == [[0], [1], [2]]
