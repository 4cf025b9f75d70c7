"""The numbered log of a root: who may write (acquire, release) and what is live (commit).

One primitive, create-if-absent, carries it: entry n+1 can be created once. A writer creates it only while its
own acquire is the last one, so a writer that lost its root finds its slot taken and stops; there is no gap
between check and write. No clock of another machine is ever read: a holder is dead when no new heartbeat
showed up for a whole TTL on the observer's own monotonic clock.
"""

import contextlib
import getpass
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Literal

from pipeline import layout
from pipeline.errors import LockedError, StorageError
from pipeline.manifest import Document, load, to_bytes
from pipeline.storage import Storage


class LogEntry(Document):
    """One slot of the log. ``epoch`` is the slot of the writer's acquire (its own slot for an acquire)."""

    number: int
    kind: Literal["acquire", "commit", "release"]
    epoch: int
    holder: str
    run: str
    at: str
    artifact: str | None = None
    manifest_sha256: str | None = None
    parent: int | None = None


class Log:
    """A reader's view of the log; it remembers what it has seen and probes for the next slot."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.entries: list[LogEntry] = []

    def refresh(self) -> "Log":
        """Read every entry not yet seen, in order. Entries are never changed, so no entry is read twice."""
        while (entry := load(LogEntry, self._storage, layout.log_entry(len(self.entries)))) is not None:
            self.entries.append(entry)
        return self

    @property
    def live(self) -> LogEntry | None:
        """The last commit: it names the live artifact."""
        return next((entry for entry in reversed(self.entries) if entry.kind == "commit"), None)

    @property
    def holder(self) -> LogEntry | None:
        """The acquire that has not been released, if any."""
        for entry in reversed(self.entries):
            if entry.kind == "release":
                return None
            if entry.kind == "acquire":
                return entry
        return None

    def create(self, entry: LogEntry) -> bool:
        """Try to take the next slot; False when another writer was first."""
        return self._storage.create(layout.log_entry(entry.number), to_bytes(entry))


class Lease:
    """The right to write under a root, kept up by heartbeats from a thread until ``release``."""

    def __init__(self, log: Log, storage: Storage, acquire: LogEntry, ttl_s: float) -> None:
        self._log = log
        self._storage = storage
        self._acquire = acquire
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

    def commit(self, artifact: str, manifest_sha256: str) -> LogEntry:
        """Make an artifact live; raises LockedError when another writer has taken the root."""
        live = self._log.live
        return self._append("commit", artifact=artifact, manifest_sha256=manifest_sha256, parent=live.number if live else None)

    def release(self) -> None:
        """Give the root back. A root that was taken meanwhile stays taken."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(LockedError):
            self._append("release")

    def _append(self, kind: Literal["commit", "release"], **fields: str | int | None) -> LogEntry:
        holder = self._log.refresh().holder
        if holder is None or holder.epoch != self.epoch:
            raise LockedError(_lost(self._storage, self._acquire, holder))
        entry = self._acquire.model_copy(update={"number": len(self._log.entries), "kind": kind, "at": _now(), **fields})
        if not self._log.create(entry):
            raise LockedError(_lost(self._storage, self._acquire, self._log.refresh().holder))
        self._log.refresh()
        return entry

    def _beat(self, interval_s: float) -> None:
        sequence = 0
        while not self._stop.wait(interval_s if sequence else 0):
            with contextlib.suppress(StorageError):  # a missed beat is what the TTL is for
                self._storage.put(layout.beat(self.epoch, sequence), _now().encode())
            sequence += 1


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
            _wait_for_death(storage, held, next_slot=len(log.entries), ttl_s=ttl_s)
        number = len(log.entries)
        entry = LogEntry(number=number, kind="acquire", epoch=number, holder=_holder_name(), run=run, at=_now())
        if log.create(entry):
            log.refresh()
            return Lease(log, storage, entry, ttl_s)
        log.refresh()


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
            raise LockedError(
                f"{storage.uri}: another run is writing: {held.holder}, run {held.run}, since {held.at}; wait until it ends"
            )


def _lost(storage: Storage, mine: LogEntry, holder: LogEntry | None) -> str:
    who = f"{holder.holder} (run {holder.run}, since {holder.at})" if holder else "a writer that has ended since"
    return f"{storage.uri}: run {mine.run} lost the root to {who}; nothing was committed, run the same command again"


def _holder_name() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user id without an entry in /etc/passwd
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()} pid {os.getpid()}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
