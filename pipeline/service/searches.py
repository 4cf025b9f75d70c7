"""A bounded pool of threads that search: reads of one index are safe side by side, each on its own thread alone."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from pipeline.exposition import Meters
from pipeline.index import set_threads
from pipeline.metrics import QUEUE_DEPTH
from pipeline.service.refusals import RefusedError

Found = TypeVar("Found")


class Searches:
    """``threads`` searches at a time, ``queue`` more that wait; OpenMP threads are per calling thread, so each sets its own."""

    def __init__(self, threads: int | None, queue: int, meters: Meters) -> None:
        self.threads = threads or len(os.sched_getaffinity(0))
        self._limit = self.threads + queue
        self._pending = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(self.threads, "vecmill-search", initializer=set_threads, initargs=(1,))
        meters.follow(QUEUE_DEPTH, lambda: self._pending, queue="search")

    def submit(self, work: Callable[..., Found], *arguments: Any) -> "Future[Found]":
        """Run on a thread; RefusedError 429 when too many wait."""
        with self._lock:
            if self._pending >= self._limit:
                raise RefusedError(429, "queue_full", f"{self._pending} searches wait for a thread, the limit; come again")
            self._pending += 1
        future = self._pool.submit(work, *arguments)
        future.add_done_callback(self._done)
        return future

    def close(self) -> None:
        """Finish what is at work."""
        self._pool.shutdown(cancel_futures=True)

    def _done(self, future: "Future[Any]") -> None:
        with self._lock:
            self._pending -= 1
