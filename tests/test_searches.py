"""Searches that wait are searched together, nobody fails for another, and the queue is bounded."""

import threading

import pytest

from pipeline.metrics import SERVICE
from pipeline.operations.exposition import Meters
from pipeline.service.refusals import RefusedError
from pipeline.service.searches import COMPANY, Searches
from tests.conftest import eventually


class Work:
    """Holds its first call up until ``go``; remembers what it was called with."""

    def __init__(self):
        self.calls = []
        self.go = threading.Event()

    def __call__(self, items):
        self.calls.append(list(items))
        if len(self.calls) == 1:
            self.go.wait(30)
        if "bad" in items:
            raise ValueError("bad")
        return [f"found {item}" for item in items]


@pytest.fixture
def searches():
    made = Searches(1, 100, Meters(SERVICE))
    yield made
    made.close()


def busy(searches, work):
    """The only thread is at work."""
    first = searches.submit(work, "first", "x")
    eventually(lambda: work.calls)
    return first


def test_what_waits_is_searched_together_with_its_like_only(searches):
    work, other = Work(), Work()
    other.go.set()
    first = busy(searches, work)
    futures = [searches.submit(work, number, "x") for number in range(COMPANY + 2)]
    alone = [searches.submit(other, name) for name in "ab"]
    stranger = searches.submit(other, "c", "y")
    work.go.set()
    assert [each.result(30) for each in futures] == [f"found {number}" for number in range(COMPANY + 2)]
    assert (first.result(30), [each.result(30) for each in alone]) == ("found first", ["found a", "found b"])
    assert stranger.result(30) == "found c"
    assert work.calls == [["first"], list(range(COMPANY)), [COMPANY, COMPANY + 1]]
    assert other.calls == [["a"], ["b"], ["c"]]


def test_nobody_fails_for_another(searches):
    work = Work()
    busy(searches, work)
    futures = [searches.submit(work, item, "x") for item in ("good", "bad", "fine")]
    work.go.set()
    assert (futures[0].result(30), futures[2].result(30)) == ("found good", "found fine")
    with pytest.raises(ValueError, match="bad"):
        futures[1].result(30)


def test_what_was_given_up_is_not_searched_and_gives_its_place_back():
    searches, work = Searches(1, 2, Meters(SERVICE)), Work()
    busy(searches, work)
    futures = [searches.submit(work, number, "x") for number in range(2)]
    with pytest.raises(RefusedError, match="3 searches wait"):
        searches.submit(work, 2, "x")
    assert futures[0].cancel()
    last = searches.submit(work, 3, "x")
    work.go.set()
    assert last.result(30) == "found 3"
    assert work.calls == [["first"], [1, 3]]
    searches.close()
