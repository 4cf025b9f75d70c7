"""What the commands share: options, the error boundary with its exit codes, progress on stderr."""

import functools
import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any, ParamSpec

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipeline.errors import VecmillError
from pipeline.job import Event, Say

ConfigOption = Annotated[str, typer.Option("--config", "-c", help="Config file, YAML")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override a config key: a.b=value; repeatable")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show what Ray and the libraries log")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors")]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N documents")]

SIGNALLED = 128
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
PIPE_WIDTH = 160
results = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
messages = Console(stderr=True, highlight=False, soft_wrap=True)

P = ParamSpec("P")


class _TerminatedError(BaseException):
    """SIGTERM, as an exception, so that what is held is released."""


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Turn our errors into one line on stderr and an exit code; anything else is a bug and keeps its traceback."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        signal.signal(signal.SIGTERM, _terminate)
        logging.basicConfig(level=logging.DEBUG if kwargs.get("verbose") else logging.WARNING, stream=sys.stderr)
        try:
            function(*args, **kwargs)
        except VecmillError as error:
            messages.print(f"vecmill: {error}", markup=False)
            raise typer.Exit(exit_code(error)) from error
        except (KeyboardInterrupt, _TerminatedError) as error:
            messages.print("vecmill: stopped; what was finished is kept, run the same command to resume")
            raise typer.Exit(exit_code(error)) from error

    return guarded


def exit_code(error: BaseException) -> int:
    """What a command that ends with an error exits with; a bug is 1."""
    if isinstance(error, VecmillError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return SIGNALLED + signal.SIGINT
    return SIGNALLED + signal.SIGTERM if isinstance(error, _TerminatedError) else 1


def duration(text: str) -> float:
    """Seconds of a duration such as 36h; raises BadParameter on what is none."""
    number, unit = text[:-1], text[-1:]
    if unit not in SECONDS or not number.replace(".", "", 1).isdigit():
        raise typer.BadParameter(f"{text}: expected a number and one of {', '.join(SECONDS)}, as in 36h or 7d")
    return float(number) * SECONDS[unit]


def print_json(value: Any) -> None:
    """One JSON value on stdout."""
    print(json.dumps(value, ensure_ascii=False, indent=1, default=str))  # noqa: T201 - results go to stdout


@contextmanager
def progress(*, quiet: bool = False) -> Iterator[Say]:
    """A way to tell events: bars with rate and ETA on a terminal, one line per finished stage elsewhere."""
    if quiet:
        yield lambda _: None
    elif messages.is_terminal:
        with _bars() as bars:
            yield _Bars(bars)
    else:
        yield _tell


def _tell(event: Event) -> None:
    if event.message:
        messages.print(f"{event.stage}: {event.message}", markup=False)


def _bars() -> Progress:
    columns = (TextColumn("{task.description:>8}"), BarColumn(24), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=messages, transient=True)


class _Bars:
    """One bar per stage; a finished stage becomes a line above them."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, event: Event) -> None:
        if event.message:
            self._bars.console.print(f"{event.stage}: {event.message}", markup=False)
            if event.stage in self._tasks:
                self._bars.remove_task(self._tasks.pop(event.stage))
            return
        if event.stage not in self._tasks:
            self._tasks[event.stage] = self._bars.add_task(event.stage, total=event.total, rate="")
        task = self._tasks[event.stage]
        elapsed = self._bars.tasks[self._bars.task_ids.index(task)].elapsed or 0
        tokens = event.counts.get("tokens", 0)
        rate = f"{tokens / elapsed:,.0f} tokens/s" if tokens and elapsed else ""
        self._bars.update(task, completed=event.done, rate=rate)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _TerminatedError
