"""How a run ended: ``runs/<run>/result.json``, created once, whatever the end.

Ray knows success and failure of a job and no more, and a scheduler that was restarted remembers nothing: both read it here.
The name of a scheduled run carries its tick, so what a root holds tells which ticks are settled.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import Field

from pipeline.errors import ConfigError, LockedError
from pipeline.root import layout
from pipeline.root.log import Log
from pipeline.root.manifest import Document, load, to_bytes
from pipeline.root.storage import Storage

NAME = re.compile(r"(?!\.+$)[A-Za-z0-9._-]{1,100}")
SCHEDULED = re.compile(r"vecmill-[0-9a-f]+-(\d{8}T\d{4}Z)-\d+")
TICK_FORMAT = "%Y%m%dT%H%MZ"
STOPPED = (130, 143)
"""Exit codes of runs that a signal stopped: they settle nothing."""
MAX_ERROR_CHARS = 1000


class RunResult(Document):
    """``exit_code`` of the command, ``error`` in one line; of a run that is done: what is live then, what was counted."""

    run: str
    exit_code: int
    error: str | None = None
    artifact: str | None = None
    committed: bool = False
    counts: dict[str, int] = Field(default_factory=dict)
    started: datetime
    ended: datetime


@dataclass(frozen=True)
class History:
    """``settled``: ticks up to then need no run. ``succeeded``: when the last run that brought the root up to date began."""

    settled: datetime | None = None
    succeeded: datetime | None = None


def check_name(storage: Storage, run: str) -> None:
    """Raise ConfigError on a name that cannot be one, or that a run which has ended has."""
    if not NAME.fullmatch(run):
        raise ConfigError(f"--run {run}: expected at most 100 letters, digits, dots, hyphens and underscores")
    if read_result(storage, run) is not None:
        raise ConfigError(f"{storage.at(layout.run(run, 'result.json'))}: this run has ended; choose another --run")


def read_result(storage: Storage, run: str) -> RunResult | None:
    """How a run ended; None while it has not."""
    return load(RunResult, storage, layout.run(run, "result.json"))


def write_result(storage: Storage, result: RunResult) -> bool:
    """Create the result of a run; False where the run of this name has one or, locked out, is still at work elsewhere."""
    if result.exit_code == LockedError.exit_code and (holder := Log(storage).refresh().holder) and holder.run == result.run:
        return False
    return storage.create(layout.run(result.run, "result.json"), to_bytes(result))


def one_line(error: BaseException) -> str:
    """What went wrong, for people, bounded."""
    if not isinstance(error, Exception):
        return "stopped by a signal"
    return (" ".join(str(error).split()) or type(error).__name__)[:MAX_ERROR_CHARS]


def scheduled_name(digest: str, tick: datetime, attempt: int) -> str:
    """Name of a run for a tick. ``digest``: what was asked for."""
    return f"vecmill-{digest}-{tick.astimezone(UTC):{TICK_FORMAT}}-{attempt}"


def next_attempt(storage: Storage, digest: str, tick: datetime) -> str:
    """Name of the first run for a tick that has not ended."""
    names = (scheduled_name(digest, tick, attempt) for attempt in itertools.count(1))
    return next(name for name in names if read_result(storage, name) is None)


def history(storage: Storage, now: datetime) -> History:
    """What results and commits of a root say. A failed run settles its tick: the next tick is the next attempt.

    What a clock that was ahead dated after ``now`` counts for nothing: it would settle all ticks until then. ``gc`` takes
    old results, but not those that this rests on; the log keeps the commits.
    """
    settled = succeeded = None
    for tick, result in _settling(storage, now):
        settled = settled or tick
        if _succeeded(result, now):
            succeeded = result.started
            break
    built = _last_built(storage, succeeded, now)
    return History(_latest(settled, built), _latest(succeeded, built))


def remembered(storage: Storage, now: datetime) -> set[str]:
    """Paths of the results that ``history`` rests on: of the latest settled tick, and of the latest run that succeeded."""
    found: list[str] = []
    for _, result in _settling(storage, now):
        if not found or _succeeded(result, now):
            found.append(layout.run(result.run, "result.json"))
        if _succeeded(result, now):
            break
    return set(found)


def _settling(storage: Storage, now: datetime) -> Iterator[tuple[datetime, RunResult]]:
    """Ticks up to ``now`` that need no run any more with how their runs ended, latest first."""
    names = (path.rpartition("/")[2] for path in storage.list(layout.RUNS))
    ticks = sorted(((match[1], name) for name in names if (match := SCHEDULED.fullmatch(name))), reverse=True)
    for tick, name in ticks:
        moment = datetime.strptime(tick, TICK_FORMAT).replace(tzinfo=UTC)
        result = read_result(storage, name) if moment <= now else None
        if result is not None and result.exit_code not in STOPPED:
            yield moment, result


def _succeeded(result: RunResult, now: datetime) -> bool:
    return result.exit_code == 0 and result.started <= now


def _last_built(storage: Storage, after: datetime | None, now: datetime) -> datetime | None:
    """When the run began that built and committed last up to ``now``, if later than ``after``. A rollback builds nothing."""
    epoch = None
    for entry in Log(storage).refresh().backwards():
        at = datetime.fromisoformat(entry.at)
        if epoch is None and at > now:
            continue
        if epoch is None and after and at <= after:
            return None
        if epoch is None and entry.kind == "commit" and str(entry.artifact).startswith(f"{entry.epoch:06d}-"):
            epoch = entry.epoch
        if entry.number == epoch:
            return at
    return None


def _latest(*moments: datetime | None) -> datetime | None:
    return max((moment for moment in moments if moment), default=None)
