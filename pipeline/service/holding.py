"""What one partition of a service has open: its share of the live artifact and of the one before, so that a router may lag.

It follows the log by itself, so a new artifact is there before the router asks for it; what it does not have it opens when
it is asked.
"""

import logging
import threading
from collections import OrderedDict
from typing import Any, Literal

from pipeline.artifacts.live import OpenedShare, open_share
from pipeline.config import Config, SearchConfig
from pipeline.errors import ConfigError, VecmillError, VerificationError
from pipeline.root import layout
from pipeline.root.log import Log
from pipeline.root.storage import Storage
from pipeline.search.partition import LocalPartition
from pipeline.service.following import RETRY_S, Refusal

KEPT = 2

Question = Literal["dense", "lexical", "rows", "vector_of"]
"""The methods of a Partition."""

_log = logging.getLogger(__name__)


class Holding:
    """Partition ``number`` of ``count`` of what is live, or of the artifact at ``artifact``. Raises what opening it raises."""

    def __init__(self, config: Config | None, artifact: str | None, number: int, count: int) -> None:
        self._search = config.search if config else SearchConfig()
        self._artifact = artifact
        self._share = number, count
        self._held: OrderedDict[str, OpenedShare] = OrderedDict()
        self._changed = threading.Lock()
        self._opening = threading.Lock()
        self._stop = threading.Event()
        self._refusal = Refusal()
        if artifact is not None:
            self._storage = Storage(artifact, config.store if config else None)
            self._hold(self._opened(""))
        elif config is not None:
            self._storage = Storage(config.root, config.store)
            log = Log(self._storage)
            self._look(log, starting=True)
            threading.Thread(target=self._run, args=(log, config.serve.poll_s), daemon=True, name="vecmill-holding").start()
        else:
            raise ConfigError("serve: give config (a path) or artifact (a URI)")

    def close(self) -> None:
        """Follow no more."""
        self._stop.set()

    def answer(self, version: str, question: Question, arguments: tuple[Any, ...]) -> Any:
        """What the share of an artifact answers; raises what Partition's method and ``partition`` raise."""
        return getattr(self.partition(version), question)(*arguments)

    def partition(self, version: str) -> LocalPartition:
        """The share of an artifact, opened if need be; the one that was asked for longest ago is closed for it.

        Raises VerificationError where it is not there or not what it must be.
        """
        if held := self._found(version):
            return held.partition
        with self._opening:
            if held := self._found(version):
                return held.partition
            try:
                opened = self._opened("" if self._artifact is not None else layout.artifact(version))
            except ConfigError as error:  # to the client a ConfigError is a question that cannot be asked
                raise VerificationError(str(error)) from error
            if opened.version != version:
                raise VerificationError(f"{self._storage.uri}: artifact {opened.version} is there, {version} is asked for")
            self._hold(opened)
            return opened.partition

    def _opened(self, folder: str) -> OpenedShare:
        return open_share(self._storage, folder, self._search, *self._share)

    def _hold(self, opened: OpenedShare) -> None:
        with self._changed:
            self._held[opened.version] = opened
            while len(self._held) > KEPT:
                self._held.popitem(last=False)

    def _found(self, version: str) -> OpenedShare | None:
        with self._changed:
            if version in self._held:
                self._held.move_to_end(version)
            return self._held.get(version)

    def _look(self, log: Log, *, starting: bool = False) -> None:
        """Have what is live. What is broken the router refuses, and asks for what was before.

        Raises what else a replica that starts cannot do: it is tried again, and asked nothing until then.
        """
        version = None
        try:
            entry = log.refresh().live
            version = entry.artifact if entry else None
            if version is not None and not self._refusal.holds(version):
                self.partition(version)
        except (VecmillError, OSError) as error:
            if starting and not isinstance(error, VerificationError):
                raise
            if version is not None:
                self._refusal.again(version)
            _log.warning("what is live cannot be opened: %s", error)

    def _run(self, log: Log, poll_s: float) -> None:
        while not self._stop.wait(poll_s):
            try:
                self._look(log)
            except Exception:  # noqa: BLE001 - else this thread ended, and nothing would ever be followed again
                _log.exception("the log of %s cannot be followed", self._storage.uri)
                self._stop.wait(RETRY_S)
