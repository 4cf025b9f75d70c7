"""``vecmill schedule``: a run for every tick of a cron expression, one at a time.

Its memory is what is under the root (pipeline.root.result): after a restart it makes up what was missed in one run and runs
nothing twice. A run is a process of its own, so no end of a run is the scheduler's end, and its exit code is only told.
"""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from jobs.options import SIGNALLED, ConfigOption, SetOption, VerboseOption, command, duration, messages
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.errors import ConfigError, VecmillError
from pipeline.operations.schedule import Schedule
from pipeline.operations.submission import digest
from pipeline.root.result import History, history, next_attempt, read_result
from pipeline.root.storage import Storage

LONGEST_SLEEP_S = 60.0
"""A machine that was suspended or whose clock was set looks again after so long."""
Tell = Callable[..., None]


@dataclass(frozen=True)
class Clock:
    """The time, and how to wait for it."""

    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    sleep: Callable[[float], None] = time.sleep


@command
def schedule(
    config: ConfigOption,
    cron: Annotated[str, typer.Option("--cron", help="Minute, hour, day, month, weekday: '0 3 * * *'")],
    zone: Annotated[str, typer.Option("--tz", help="Time zone of --cron, an IANA name")] = "UTC",
    overrides: SetOption = None,
    address: Annotated[str | None, typer.Option("--address", help="Submit the runs to the Ray cluster there")] = None,
    image: Annotated[bool, typer.Option("--image", help="With --address: use the vecmill that its nodes have")] = False,
    once: Annotated[bool, typer.Option("--once", help="Run if a tick is due, exit with its code")] = False,
    metrics_file: Annotated[
        str | None, typer.Option("--metrics-file", help="For runs on this machine: as reindex --metrics-file")
    ] = None,
    max_staleness: Annotated[
        str | None, typer.Option("--max-staleness", help="Tell when no run has succeeded for so long: 36h")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Log lines as JSON, one object per line, on stderr")] = False,
    verbose: VerboseOption = False,
) -> None:
    """Run reindex at every tick; missed ticks are made up in one run, two never overlap."""
    settings, times = load_config(config, tuple(overrides or ())), Schedule(cron, zone)
    kind = ["submit", "--address", address, *(["--image"] if image else [])] if address else ["reindex"]
    arguments = [*kind, "-c", config, *(part for value in overrides or () for part in ("--set", value))]
    if metrics_file and address:
        raise ConfigError("--metrics-file: a run on a cluster writes no file here; scrape Ray's own metrics there")
    arguments += ["--metrics-file", metrics_file] if metrics_file else []
    arguments += ["-v"] if verbose else ["-q"] if as_json else []
    limit = timedelta(seconds=duration(max_staleness)) if max_staleness else None
    runner = Runner(settings, arguments, _tell_json if as_json else _tell_text, limit)
    code = follow(times, runner, Clock(), once=once)
    if code:
        raise typer.Exit(code)


class Runner:
    """Runs of one root, each a process of its own, and what is told about them."""

    def __init__(self, config: Config, arguments: list[str], tell: Tell, max_staleness: timedelta | None = None) -> None:
        self._storage = Storage(config.root, config.store)
        self._digest = digest(config)
        self._arguments = arguments
        self._submits = arguments[0] == "submit"  # submit names the run: it knows the cluster's attempts too
        self._max_staleness = max_staleness
        self._alarmed = False
        self.tell = tell

    def history(self, now: datetime) -> History:
        """What the root says of earlier runs."""
        return history(self._storage, now)

    def run(self, tick: datetime, now: datetime) -> int | None:
        """Run for a tick and return the exit code; None where another scheduler has settled it meanwhile."""
        try:
            past = self.history(now)
            if past.settled and past.settled >= tick:
                self.tell("settled", f"the tick of {_minute(tick)} is settled already", tick=tick)
                return None
            return self._run(tick)
        except VecmillError as error:  # the root cannot be read: like a run that failed, the next tick is the next attempt
            self.tell("ended", f"the tick of {_minute(tick)}: {error}", tick=tick, exit_code=error.exit_code)
            return error.exit_code

    def _run(self, tick: datetime) -> int:
        name = None if self._submits else next_attempt(self._storage, self._digest, tick)
        what = f"run {name}" if name else "submit"
        self.tell("started", f"{what} for the tick of {_minute(tick)}", tick=tick, run=name)
        which = ["--run", name] if name else ["--tick", tick.isoformat()]
        code = _to_the_end([sys.executable, "-m", "jobs", *self._arguments, *which])
        result = read_result(self._storage, name) if name else None
        error = result.error if result else None
        text = f"{what} ended with exit code {code}" + (f": {error}" if error else "")
        self.tell("ended", text, tick=tick, run=name, exit_code=code, error=error)
        return code

    def watch(self, succeeded: datetime | None, now: datetime) -> None:
        """Tell once when no run has succeeded for too long."""
        stale = self._max_staleness is not None and (succeeded is None or now - succeeded > self._max_staleness)
        if stale and not self._alarmed:
            since = f"since {_minute(succeeded)}" if succeeded else "so far"
            self.tell("stale", f"stale: no run has succeeded {since}", succeeded=succeeded)
        self._alarmed = stale


def follow(times: Schedule, runner: Runner, clock: Clock, *, once: bool = False) -> int:
    """Run what is due, wait for the next tick, for ever; ``once``: return the exit code of what was due instead of waiting."""
    known, announced = runner.history(clock.now()), None
    while True:
        now, code = clock.now(), 0
        if known.settled and known.settled > now:  # the clock was ahead and has been put right
            with contextlib.suppress(VecmillError):  # of a storage that is away: asked again after the next sleep
                known = runner.history(now)
        if tick := times.due(known.settled, now):
            ended = runner.run(tick, now)
            code = ended or 0
            known = runner.history(now) if ended is None else History(tick, known.succeeded if code else now)
        runner.watch(known.succeeded, clock.now())
        if once and tick:
            return code
        following = times.following(now)
        left_s = (following - clock.now()).total_seconds()
        if left_s > 0 and following != announced:
            runner.tell("waiting", f"next tick: {_minute(following)}", next=following)
            announced = following
        if once:
            return 0
        if left_s > 0:
            clock.sleep(min(left_s, LONGEST_SLEEP_S))


def _to_the_end(arguments: list[str]) -> int:
    """Exit code of a process. A signal that ends this one is passed on, and the end of the other waited for."""
    process = subprocess.Popen(arguments, start_new_session=True)  # noqa: S603 - this program; Ctrl-C shall reach it once
    try:
        code = process.wait()
    except BaseException as error:
        process.send_signal(signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM)
        process.wait()
        raise
    return code if code >= 0 else SIGNALLED - code


def _minute(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def _tell_text(event: str, text: str, **fields: Any) -> None:
    messages.print(f"schedule: {text}", markup=False)


def _tell_json(event: str, text: str, **fields: Any) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    line = json.dumps({"at": now, "event": event, "text": text} | fields, ensure_ascii=False, default=str)
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - a line for machines, never wrapped
