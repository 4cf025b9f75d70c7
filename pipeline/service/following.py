"""Which artifact answers: the live one of a root, followed from commit to commit, or one that never changes.

A new artifact is verified and opened beside the one that serves, then one reference changes; requests that began on the
old one end on it, and the last of them frees it. What is broken or of another encoder is refused: the old one goes on, and
the service says that it is degraded.
"""

import logging
import threading
import time
from dataclasses import dataclass
from datetime import datetime

from pipeline.artifacts.live import Elsewhere, Opened, open_commit, search_point
from pipeline.config import Config, SearchConfig
from pipeline.errors import ConfigError, VecmillError
from pipeline.metrics import DEGRADED, INDEX_AGE, INDEX_NTOTAL, RECALL, SWAPS
from pipeline.operations.exposition import Meters
from pipeline.root.log import Log, LogEntry
from pipeline.root.manifest import OperatingPoint
from pipeline.root.storage import Storage

RETRY_S, LONGEST_RETRY_S = 60.0, 900.0
"""A commit that was refused is tried again after so long, its files may have been restored; then after twice as long."""
EARLIER = 3
"""Artifacts before the live one that are tried where a service starts and that one cannot be opened."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """What a request is answered from, from its first step to its last. ``commit``: its number, None for a fixed artifact."""

    opened: Opened
    point: OperatingPoint
    commit: int | None = None

    @property
    def version(self) -> str:
        """Name of the artifact."""
        return self.opened.manifest.version

    @property
    def created(self) -> float:
        """When the artifact was made, Unix time."""
        return datetime.fromisoformat(self.opened.manifest.created).timestamp()


class Current:
    """The artifact that answers now; ``degraded``: why what is live is not that one, None when it is."""

    def __init__(self, served: Served, meters: Meters) -> None:
        self.served = served
        self.degraded: str | None = None
        self._meters = meters
        meters.follow(INDEX_AGE, lambda: time.time() - self.served.created)
        meters.follow(DEGRADED, lambda: float(self.degraded is not None))
        meters.follow(INDEX_NTOTAL, lambda: float(self.served.opened.manifest.counts["passages"]))
        meters.follow(RECALL, lambda: self.served.opened.manifest.evaluation.recall)

    def switch(self, served: Served) -> None:
        """Let all requests from now on be answered by another artifact."""
        self.served = served
        self.degraded = None
        self._meters.count(SWAPS, result="switched")

    def refuse(self, reason: str) -> None:
        """Go on with the artifact that is there."""
        self.degraded = reason
        self._meters.count(SWAPS, result="refused")


class Refusal:
    """What was refused last, and until when it need not be tried again."""

    def __init__(self) -> None:
        self._what: object = None
        self._wait_s = self._until = 0.0

    def holds(self, what: object) -> bool:
        """Whether it is too early to try this again."""
        return what == self._what and time.monotonic() < self._until

    def again(self, what: object) -> None:
        """It was refused, for the first time or once more."""
        self._wait_s = min(2 * self._wait_s, LONGEST_RETRY_S) if what == self._what else RETRY_S
        self._what, self._until = what, time.monotonic() + self._wait_s


class Follower:
    """Opens what is live; its thread asks the log for the next entry every ``serve.poll_s`` seconds."""

    def __init__(self, config: Config, meters: Meters, elsewhere: Elsewhere | None = None) -> None:
        """Raises ConfigError where nothing is live, what opening it raises where that and what was before are broken."""
        self._config = config
        self._elsewhere = elsewhere
        self._log = Log(Storage(config.root, config.store))
        entry = self._log.refresh().live
        if entry is None:
            raise ConfigError(f"{config.root}: nothing is live here; run vecmill reindex first")
        self._refusal = Refusal()
        try:
            self.current = Current(self._open(entry, None), meters)
        except (VecmillError, OSError) as error:
            earlier = self._earlier(entry)
            if earlier is None:
                raise
            self.current = Current(earlier, meters)
            self._refuse(entry, error)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="vecmill-follower")

    def start(self) -> None:
        """Begin to follow."""
        self._thread.start()

    def close(self) -> None:
        """Follow no more; what is being opened is not waited for."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(self._config.serve.poll_s):
            try:
                self._look()
            except Exception as error:  # noqa: BLE001 - else this thread ended, and nothing would ever be followed again
                _log.exception("the log of %s cannot be followed", self._config.root)
                self.current.degraded = f"the log cannot be followed: {type(error).__name__}"

    def _look(self) -> None:
        try:
            entry = self._log.refresh().live
        except (VecmillError, OSError) as error:
            self.current.degraded = f"the log cannot be read: {error}"
            return
        if entry is None or entry.number == self.current.served.commit:
            self.current.degraded = None
            return
        if self._refusal.holds(entry.number):
            return
        try:
            served = self._open(entry, self.current.served)
        except (VecmillError, OSError) as error:
            self._refuse(entry, error)
            return
        self.current.switch(served)

    def _refuse(self, entry: LogEntry, error: Exception) -> None:
        self._refusal.again(entry.number)
        _log.warning("commit %d is not served: %s", entry.number, error)
        self.current.refuse(f"commit {entry.number} is not served: {error}")

    def _earlier(self, live: LogEntry) -> Served | None:
        """The latest artifact made before the live one that can be opened; not a later one, which was rolled back."""
        tried = {live.artifact}
        for entry in self._log.backwards():
            if len(tried) > EARLIER:
                break
            if entry.kind == "commit" and entry.artifact not in tried and str(entry.artifact) < str(live.artifact):
                tried.add(entry.artifact)
                try:
                    return self._open(entry, None)
                except (VecmillError, OSError) as error:
                    _log.warning("commit %d is not served either: %s", entry.number, error)
        return None

    def _open(self, entry: LogEntry, before: Served | None) -> Served:
        opened = open_commit(self._config, entry, before.opened if before else None, self._elsewhere)
        return Served(opened, search_point(opened.manifest, self._config.search), entry.number)


def fixed(opened: Opened, search: SearchConfig, meters: Meters) -> Current:
    """An artifact that is never replaced."""
    return Current(Served(opened, search_point(opened.manifest, search)), meters)
