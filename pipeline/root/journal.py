"""What a run tells, kept under its root (``runs/<run>/events/<n>.json``), so that anybody anywhere sees how far it is.

Each file is the whole state at a moment, created once; the last one is all there is to read. A thread writes them, so a
storage that is slow or away costs a picture of the run and never the run.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Literal

from pipeline.errors import StorageError, VecmillError
from pipeline.root import layout
from pipeline.root.job import Event, Job
from pipeline.root.log import Log
from pipeline.root.manifest import Document, Values, load, to_bytes
from pipeline.root.storage import Storage

MIN_INTERVAL_S = 1.0
"""Stages that follow each other faster share a file."""
PROGRESS_INTERVAL_S = 15.0
INTERVAL_SHARE = 0.01
"""Of the time so far, where that is longer: a day has 500 files, ten days have 740."""
CLOSE_TIMEOUT_S = 10.0
LOOKED_AT_RUNS = 4
"""For each run to find: some are without events, as that of a rollback."""


class StageState(Values):
    """The last that a stage told; ``message``: its last words for people."""

    stage: str
    message: str
    done: int
    total: int
    counts: dict[str, int]
    elapsed_s: float
    rate: dict[str, float]
    eta_s: float | None
    ended: bool


class RunState(Document):
    """A run at one moment: its stages in the order in which they began. ``why``: what failed or stopped it."""

    run: str
    at: str
    state: Literal["running", "finished", "failed", "stopped"] = "running"
    why: str = ""
    stages: tuple[StageState, ...] = ()


@contextlib.contextmanager
def journal(job: Job) -> Iterator[Job]:
    """For the length of a block a job that also writes down what it tells, and at last how it ended."""
    writer = _Writer(job.storage, job.run_id)
    state: Literal["finished", "failed", "stopped"] = "stopped"
    why = ""
    try:
        yield replace(job, say=job.say.also(writer))
        state = "finished"
    except VecmillError as error:
        state, why = "failed", str(error)
        raise
    except Exception as error:
        state, why = "failed", f"{type(error).__name__}, a bug"
        raise
    finally:
        writer.close(state, why)


def last_runs(storage: Storage, count: int) -> list[RunState]:
    """The last state of the latest runs that wrote any, latest first. One that was killed says it is running."""
    found: list[RunState] = []
    began = [entry.run for entry in Log(storage).refresh().backwards() if entry.kind == "acquire"]  # names have no order
    others = (folder.rpartition("/")[2] for folder in reversed(storage.list(layout.RUNS)))  # that did not get that far
    for run in list(dict.fromkeys((*began, *others)))[: LOOKED_AT_RUNS * count]:
        files = storage.list(layout.events(run))
        state = load(RunState, storage, files[-1]) if files else None
        if state is not None:
            found.append(state)
        if len(found) == count:
            break
    return found


class _Writer:
    """Holds the state of a run; its thread writes it when a stage begins or ends, and now and then in between."""

    def __init__(self, storage: Storage, run: str) -> None:
        self._storage = storage
        self._run = run
        self._stages: dict[str, StageState] = {}
        self._at = ""
        self._news, self._end = threading.Event(), threading.Event()
        self._last: RunState | None = None
        self._thread = threading.Thread(target=self._write, daemon=True, name="vecmill-journal")
        self._thread.start()

    def __call__(self, event: Event) -> None:
        """Take what an event says."""
        before = self._stages.get(event.stage)
        now = StageState(
            stage=event.stage,
            message=event.message or (before.message if before else ""),
            done=event.done if event.total or before is None else before.done,
            total=event.total or (before.total if before else 0),
            counts=event.counts or (before.counts if before else {}),
            elapsed_s=round(event.elapsed_s, 1),
            rate={name: round(value, 1) for name, value in event.rate.items()} or (before.rate if before else {}),
            eta_s=None if event.eta_s is None else round(event.eta_s, 1),
            ended=event.ended,
        )
        self._stages = self._stages | {event.stage: now}  # another thread may be reading the old one
        self._at = event.at
        if not event.is_progress:
            self._news.set()

    def close(self, state: Literal["finished", "failed", "stopped"], why: str) -> None:
        """Write how the run ended, if the storage takes it in time."""
        self._last = self._state().model_copy(update={"state": state, "why": why})
        self._end.set()
        self._news.set()
        self._thread.join(CLOSE_TIMEOUT_S)

    def _state(self) -> RunState:
        return RunState(run=self._run, at=self._at, stages=tuple(self._stages.values()))

    def _write(self) -> None:
        began = time.monotonic()
        number, written = self._first_number(), self._state()
        while self._last is None:
            self._news.wait(max(PROGRESS_INTERVAL_S, INTERVAL_SHARE * (time.monotonic() - began)))
            self._news.clear()
            if self._last is None and (state := self._state()) != written:
                self._put(number, state)
                number, written = number + 1, state
            self._end.wait(MIN_INTERVAL_S)
        self._put(number, self._last)

    def _first_number(self) -> int:
        """A run that is tried again under its name goes on counting."""
        with contextlib.suppress(StorageError):
            files = self._storage.list(layout.events(self._run))
            return int(PurePosixPath(files[-1]).stem) + 1 if files else 0
        return 0

    def _put(self, number: int, state: RunState) -> None:
        with contextlib.suppress(StorageError):  # the next one says it all again
            self._storage.create(f"{layout.events(self._run)}/{number:06d}.json", to_bytes(state))
