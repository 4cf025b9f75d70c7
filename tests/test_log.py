import threading
import time

import pytest

from pipeline.errors import LockedError, VerificationError
from pipeline.root import layout
from pipeline.root.log import Log, LogEntry, writing
from pipeline.root.manifest import FORMAT, to_bytes
from pipeline.root.storage import Storage


@pytest.fixture(params=["local", "s3"])
def storage(request, tmp_path):
    if request.param == "local":
        return Storage(str(tmp_path))
    return Storage(f"s3://test/{tmp_path.name}-log", request.getfixturevalue("s3").store_config)


def kinds(storage):
    return [entry.kind for entry in Log(storage).refresh().entries]


def dead_writer(storage):
    """An acquire whose writer was killed."""
    number = len(Log(storage).refresh().entries)
    entry = LogEntry(number=number, kind="acquire", epoch=number, holder="ghost@host pid 1", run="r0", at="2026-01-01T00:00:00")
    storage.create(layout.log_entry(number), to_bytes(entry))


def test_acquire_commit_release_are_numbered_entries(storage):
    with writing(storage, "run1", 30) as lease:
        lease.commit("a1", "hash")
        lease.commit("a2", "hash")
    log = Log(storage).refresh()
    assert [(entry.number, entry.kind, entry.epoch) for entry in log.entries] == [
        (0, "acquire", 0), (1, "commit", 0), (2, "commit", 0), (3, "release", 0),
    ]  # fmt: skip
    assert (log.live.artifact, log.live.parent) == ("a2", 1)
    assert log.holder is None


def test_second_writer_is_refused_with_the_name_of_the_first(storage):
    with writing(storage, "run1", 1.0):
        started = time.monotonic()
        with (
            pytest.raises(LockedError, match=r"another run is writing: .* pid \d+, run run1, since") as error,
            writing(storage, "run2", 1.0),
        ):
            pass
        assert time.monotonic() - started < 5
        assert error.value.exit_code == 4
    assert kinds(storage) == ["acquire", "release"]


def test_dead_writer_is_taken_over_and_cannot_commit_after(storage):
    dead_writer(storage)
    with writing(storage, "run2", 0.5) as lease:
        assert lease.epoch == 1
        lease.commit("a", "h")
    assert kinds(storage) == ["acquire", "acquire", "commit", "release"]


def test_writer_that_lost_its_root_cannot_commit(storage):
    with writing(storage, "run1", 30) as lease:
        number = len(Log(storage).refresh().entries)
        thief = LogEntry(number=number, kind="acquire", epoch=number, holder="thief", run="r2", at="now")
        assert storage.create(layout.log_entry(number), to_bytes(thief))
        with pytest.raises(LockedError, match="lost the root to thief"):
            lease.commit("a", "h")
    log = Log(storage).refresh()
    assert log.live is None
    assert log.holder.holder == "thief"


def test_many_writers_at_once_take_turns_or_are_refused(storage):
    outcomes = []

    def write(number):
        try:
            with writing(storage, f"run{number}", 3.0) as lease:
                outcomes.append(lease.epoch)
                time.sleep(5)
        except LockedError:
            outcomes.append(None)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([epoch for epoch in outcomes if epoch is not None]) == 1
    assert kinds(storage) == ["acquire", "release"]


def test_damaged_entry_is_an_error_naming_the_file(storage):
    storage.put(layout.log_entry(0), b'{"format": 999}')
    with pytest.raises(VerificationError, match=rf"000000000000\.json: not a LogEntry of format {FORMAT}"):
        _ = Log(storage).refresh().live


def test_a_missing_entry_is_an_error_only_for_who_needs_it(storage):
    for number in range(3):
        with writing(storage, f"run{number}", 30) as lease:
            lease.commit(f"a{number}", "hash")
    storage.delete(layout.log_entry(1))
    assert Log(storage).refresh().live.artifact == "a2"
    assert Log(storage).refresh().next == 9
    with pytest.raises(VerificationError, match=r"000000000001\.json: missing, later entries are there; restore log/"):
        kinds(storage)


def test_a_paused_holder_that_wakes_up_cannot_commit(storage):
    with writing(storage, "paused", 0.5) as lease:
        lease._stop.set()  # SIGSTOP: no heartbeat any more
        lease._thread.join()
        with writing(storage, "next", 0.5) as taken:
            with pytest.raises(LockedError, match=r"run paused lost the root to .*run next"):
                lease.commit("mine", "hash")
            taken.commit("theirs", "hash")
        with pytest.raises(LockedError, match="run paused lost the root to a writer that has ended since"):
            lease.commit("mine", "hash")
    assert Log(storage).refresh().live.artifact == "theirs"
    assert kinds(storage) == ["acquire", "acquire", "commit", "release"]
