"""A bounded pool of threads that search: reads of one index are safe side by side, each on its own thread alone.

Nobody waits for company: a free thread takes what has waited longest, and with it what can be searched in one call with it.
For FAISS eight queries together take five eighths of their time one by one, sixteen the half (measured, IVF-PQ fast scan).
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.ann.index import set_threads
from pipeline.metrics import QUEUE_DEPTH
from pipeline.operations.exposition import Meters
from pipeline.service.refusals import RefusedError

Item = TypeVar("Item")
Found = TypeVar("Found")
COMPANY = 16
"""Items searched together: more hardly are faster, and the first waits for the last."""


@dataclass(frozen=True, eq=False)
class _Task:
    work: Callable[[Sequence[Any]], Sequence[Any]]
    item: Any
    company: object
    future: "Future[Any]"


class Searches:
    """``threads`` calls at a time, ``queue`` items that wait; OpenMP threads are per calling thread, so each sets its own."""

    def __init__(self, threads: int | None, queue: int, meters: Meters) -> None:
        self.threads = threads or len(os.sched_getaffinity(0))
        self._limit = self.threads + queue
        self._pending = 0
        self._waiting: deque[_Task] = deque()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(self.threads, "vecmill-search", initializer=set_threads, initargs=(1,))
        meters.follow(QUEUE_DEPTH, lambda: self._pending, queue="search")

    def submit(self, work: Callable[[Sequence[Item]], Sequence[Found]], item: Item, company: object = None) -> "Future[Found]":
        """Run ``work`` on a thread, on this item and others with the same ``company``; None: on this alone.

        RefusedError 429 when too many wait.
        """
        task = _Task(work, item, company, Future())
        with self._lock:
            if self._pending >= self._limit:
                raise RefusedError(429, "queue_full", f"{self._pending} searches wait for a thread, the limit; come again")
            self._pending += 1
            self._waiting.append(task)
        task.future.add_done_callback(self._done)
        self._pool.submit(self._run)
        return task.future

    def close(self) -> None:
        """Finish what is at work."""
        self._pool.shutdown(cancel_futures=True)
        for task in self._waiting:
            task.future.cancel()

    def _run(self) -> None:
        """Work on what waits longest, if another thread has not taken it along."""
        with self._lock:
            if not self._waiting:
                return
            first = self._waiting.popleft()
            tasks = [first]
            if first.company is not None:
                tasks += [task for task in self._waiting if task.company == first.company][: COMPANY - 1]
                for task in tasks[1:]:
                    self._waiting.remove(task)
        _work([task for task in tasks if task.future.set_running_or_notify_cancel()])

    def _done(self, future: "Future[Any]") -> None:
        with self._lock:
            self._pending -= 1


def _work(tasks: Sequence[_Task]) -> None:
    """What fails together is tried one by one: nobody fails for another."""
    if not tasks:
        return
    try:
        found = tasks[0].work([task.item for task in tasks])
    except BaseException as error:  # noqa: BLE001 - raised where the answer is waited for
        if len(tasks) == 1:
            tasks[0].future.set_exception(error)
        else:
            for task in tasks:
                _work([task])
        return
    for task, answer in zip(tasks, found, strict=True):
        task.future.set_result(answer)
