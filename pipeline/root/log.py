"""The numbered log of a root: who may write (acquire, release) and what is live (commit).

One primitive, create-if-absent, carries it: entry n+1 can be created once. A writer creates it only while its
own acquire is the last one, so a writer that lost its root finds its slot taken and stops; there is no gap
between check and write. No clock of another machine is ever read: a holder is dead when no new heartbeat
showed up for a whole TTL on the observer's own monotonic clock.
"""

import contextlib
import getpass
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Literal

from pipeline.errors import LockedError, StorageError, VerificationError
from pipeline.root import layout
from pipeline.root.manifest import DataFile, Document, load, to_bytes
from pipeline.root.storage import Storage

ENTRY_NAME = re.compile(r"\d{12}\.json")

CHECK_S = 1.0
"""A writer that deletes asks the log so often whether it still may."""


class LogEntry(Document):
    """One slot of the log. ``epoch`` is the slot of the writer's acquire (its own slot for an acquire).

    ``evaluation``: a file of the run that holds, where the artifact was measured again.
    """

    number: int
    kind: Literal["acquire", "commit", "release"]
    epoch: int
    holder: str
    run: str
    at: str
    artifact: str | None = None
    manifest_sha256: str | None = None
    evaluation: DataFile | None = None
    parent: int | None = None

    @property
    def who(self) -> str:
        """Who wrote it, for people."""
        return f"{self.holder}, run {self.run}, since {self.at}"


class Log:
    """A reader's view of the log; it remembers what it has seen and probes for the next slot.

    What it has not seen it reads from the end, as far as it is asked: a log grows by three entries a run.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._seen: dict[int, LogEntry] = {}
        self.next = 0
        """Number of the first free slot, as far as is known."""

    def refresh(self) -> "Log":
        """Find the entries that are new. Entries are never changed, so none is read twice."""
        if not self.next:  # a listing only tells where to begin: what it lacks is found by probing
            names = (path.rpartition("/")[2] for path in self._storage.list(layout.LOG))
            self.next = 1 + max((int(name[:-5]) for name in names if ENTRY_NAME.fullmatch(name)), default=-1)
        while (entry := load(LogEntry, self._storage, layout.log_entry(self.next))) is not None:
            self._seen[self.next] = entry
            self.next += 1
        return self

    def backwards(self) -> Iterator[LogEntry]:
        """Every entry, the last one first; raises VerificationError where one is missing."""
        for number in reversed(range(self.next)):
            if number not in self._seen:
                path = layout.log_entry(number)
                found = load(LogEntry, self._storage, path)
                if found is None:
                    raise VerificationError(f"{self._storage.at(path)}: missing, later entries are there; restore log/")
                self._seen[number] = found
            yield self._seen[number]

    @property
    def entries(self) -> list[LogEntry]:
        """Every entry in order."""
        return list(self.backwards())[::-1]

    @property
    def live(self) -> LogEntry | None:
        """The last commit: it names the live artifact."""
        return next((entry for entry in self.backwards() if entry.kind == "commit"), None)

    @property
    def holder(self) -> LogEntry | None:
        """The acquire that has not been released, if any."""
        last = next((entry for entry in self.backwards() if entry.kind != "commit"), None)
        return last if last and last.kind == "acquire" else None

    def create(self, entry: LogEntry) -> bool:
        """Try to take the next slot; False when another writer was first."""
        return self._storage.create(layout.log_entry(entry.number), to_bytes(entry))


class Lease:
    """The right to write under a root, kept up by heartbeats from a thread until ``release``."""

    def __init__(self, log: Log, storage: Storage, acquire: LogEntry, ttl_s: float) -> None:
        self._log = log
        self._storage = storage
        self._acquire = acquire
        self._checked = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(ttl_s / 5,), daemon=True, name="vecmill-lease")
        self._thread.start()

    @property
    def epoch(self) -> int:
        """Slot of this writer's acquire: unique to it, growing from writer to writer."""
        return self._acquire.epoch

    @property
    def run(self) -> str:
        """Name of this writer's run."""
        return self._acquire.run

    def check(self) -> None:
        """Raise LockedError when another writer has taken the root: before a write or delete that no later commit fences."""
        if time.monotonic() - self._checked >= CHECK_S:
            self._require_held()
            self._checked = time.monotonic()

    def commit(self, artifact: str, manifest_sha256: str, evaluation: DataFile | None = None) -> LogEntry:
        """Make an artifact live; raises LockedError when another writer has taken the root."""
        live = self._log.live
        parent = live.number if live else None
        return self._append("commit", artifact=artifact, manifest_sha256=manifest_sha256, evaluation=evaluation, parent=parent)

    def release(self) -> None:
        """Give the root back. A root that was taken meanwhile stays taken."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(LockedError):
            self._append("release")

    def _append(self, kind: Literal["commit", "release"], **fields: str | int | DataFile | None) -> LogEntry:
        self._require_held()
        entry = self._acquire.model_copy(update={"number": self._log.next, "kind": kind, "at": _now(), **fields})
        if not self._log.create(entry):
            raise LockedError(_lost(self._storage, self._acquire, self._log.refresh().holder))
        self._log.refresh()
        return entry

    def _require_held(self) -> None:
        holder = self._log.refresh().holder
        if holder is None or holder.epoch != self.epoch:
            raise LockedError(_lost(self._storage, self._acquire, holder))

    def _beat(self, interval_s: float) -> None:
        sequence = 0
        while not self._stop.wait(interval_s if sequence else 0):
            with contextlib.suppress(StorageError):  # a missed beat is what the TTL is for
                self._storage.put(layout.beat(self.epoch, sequence), _now().encode())
            sequence += 1


def last_beat(storage: Storage, held: LogEntry) -> str | None:
    """When the writer of an acquire last gave a sign of life, by its own clock; None: no sign yet."""
    beats = storage.list(layout.beat(held.epoch, 0).rpartition("/")[0])
    try:
        return storage.read(beats[-1]).decode() if beats else None
    except FileNotFoundError:
        return None


def unlock(storage: Storage) -> LogEntry | None:
    """Take the root from its holder, alive or not, and give it back: the holder can commit no more. None: nobody held it."""
    log = Log(storage).refresh()
    while (held := log.holder) is not None:
        entry = held.model_copy(update={"number": log.next, "kind": "release", "at": _now()})
        if log.create(entry):
            return held
        log.refresh()
    return None


@contextlib.contextmanager
def writing(storage: Storage, run: str, ttl_s: float, say: Callable[[str], None] = lambda _: None) -> Iterator[Lease]:
    """Hold the root for the length of a block; raises LockedError when somebody else does and is alive."""
    lease = _acquire(storage, run, ttl_s, say)
    try:
        yield lease
    finally:
        lease.release()


def _acquire(storage: Storage, run: str, ttl_s: float, say: Callable[[str], None]) -> Lease:
    log = Log(storage).refresh()
    while True:
        if (held := log.holder) is not None:
            say(f"root held by {held.holder} since {held.at}; watching {ttl_s:g} s for a sign of life")
            _wait_for_death(storage, held, next_slot=log.next, ttl_s=ttl_s)
        number = log.next
        entry = LogEntry(number=number, kind="acquire", epoch=number, holder=_holder_name(), run=run, at=_now())
        if log.create(entry):
            if not storage.is_local:
                _check_exclusive(storage, log, entry)
            log.refresh()
            return Lease(log, storage, entry, ttl_s)
        log.refresh()


def _check_exclusive(storage: Storage, log: Log, acquire: LogEntry) -> None:
    """Give the root back and raise StorageError where a storage creates what is there already: nothing would fence writers."""
    probe = layout.beat(acquire.epoch, 0)
    if storage.create(probe, b"first") and not storage.create(probe, b"second"):
        return
    log.refresh()
    log.create(acquire.model_copy(update={"number": log.next, "kind": "release"}))
    raise StorageError(
        f"{storage.uri}: this storage creates objects that are there already (it ignores If-None-Match), so two writers could "
        "both go live; try vecmill doctor storage, use another store"
    )


def _wait_for_death(storage: Storage, held: LogEntry, *, next_slot: int, ttl_s: float) -> None:
    """Return when the holder is silent for the TTL or the log has moved on; raise LockedError at a sign of life."""
    folder = layout.beat(held.epoch, 0).rpartition("/")[0]
    seen = len(storage.list(folder))
    deadline = time.monotonic() + ttl_s
    while time.monotonic() < deadline:
        time.sleep(min(ttl_s / 10, max(0.0, deadline - time.monotonic())))
        if storage.exists(layout.log_entry(next_slot)):
            return
        if len(storage.list(folder)) > seen:
            raise LockedError(f"{storage.uri}: another run is writing: {held.who}; wait until it ends")


def _lost(storage: Storage, mine: LogEntry, holder: LogEntry | None) -> str:
    who = holder.who if holder else "a writer that has ended since"
    return f"{storage.uri}: run {mine.run} lost the root to {who}; nothing was committed, run the same command again"


def _holder_name() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user id without an entry in /etc/passwd
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()} pid {os.getpid()}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
