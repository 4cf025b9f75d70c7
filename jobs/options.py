"""What the commands share: options, the error boundary with its exit codes, progress on stderr."""

import contextlib
import functools
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, ParamSpec, get_args

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from pipeline.errors import ConfigError, StorageError, VecmillError
from pipeline.root.job import Event, Say

ConfigOption = Annotated[str, typer.Option("--config", "-c", help="Config file, YAML")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override a config key: a.b=value; repeatable")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout")]
EventsOption = Annotated[bool, typer.Option("--json", help="Print JSON lines on stdout: events, the last one the result")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show what Ray and the libraries log")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors")]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N documents")]

SIGNALLED = 128
STREAM_INTERVAL_S = 3.0
"""Between two progress events of a stage on stdout."""
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
PIPE_WIDTH = 160
SHOWN_RATES = 2
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


def one_of(option: str, text: str | None, kinds: Any) -> Any:
    """The text, which is one of a Literal's, or None where none is given; raises ConfigError naming them where it is not."""
    if text is not None and text not in get_args(kinds):
        raise ConfigError(f"{option} {text}: expected one of {', '.join(get_args(kinds))}")
    return text


def print_json(value: Any) -> None:
    """One JSON value on stdout."""
    print(json.dumps(value, ensure_ascii=False, indent=1, default=str))  # noqa: T201 - results go to stdout


def write_file(file: Path, data: bytes) -> None:
    """A file that an option asked for; raises StorageError where it cannot be written."""
    try:
        file.write_bytes(data)
    except OSError as error:
        raise StorageError(f"{file}: cannot be written, {error.strerror}; choose another file") from error


def print_result(value: dict[str, Any]) -> None:
    """The last line of a stream of events."""
    _print_line({"event": "result", **value})


@contextmanager
def progress(*, quiet: bool = False, as_json: bool = False) -> Iterator[Say]:
    """A way to tell events: bars with rate and ETA on a terminal, one line per finished stage elsewhere.

    ``as_json``: on stdout as well, as JSON lines.
    """
    with contextlib.ExitStack() as stack:
        says: list[Say] = [_Stream()] if as_json else []
        if not quiet:
            says.append(stack.enter_context(_bars(messages)) if messages.is_terminal else _tell)

        def tell(event: Event) -> None:
            for say in says:
                say(event)

        yield tell


class _Stream:
    """Events as JSON lines; of a stage's progress one every few seconds."""

    def __init__(self) -> None:
        self._due: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        if event.is_progress and now < self._due.get(event.stage, 0.0):
            return
        if event.is_progress:
            self._due[event.stage] = now + STREAM_INTERVAL_S
        _print_line({"event": "stage", **event.as_dict()})


def _print_line(value: dict[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False, default=str), flush=True)  # noqa: T201 - results go to stdout


def _tell(event: Event) -> None:
    if event.message:
        messages.print(f"{event.stage}: {event.message}", markup=False)


@contextmanager
def _bars(console: Console) -> Iterator[Say]:
    columns = (TextColumn("{task.description:>8}"), BarColumn(24), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    left = TextColumn("{task.fields[left]}")
    with Progress(*columns, TimeElapsedColumn(), left, console=console, transient=True) as bars:
        yield _Bars(bars)


class _Bars:
    """One bar per stage; a finished stage becomes a line above them."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, event: Event) -> None:
        if event.message:
            self._bars.console.print(f"{event.stage}: {event.message}", markup=False)
        if event.ended or event.message:
            if event.stage in self._tasks:
                self._bars.remove_task(self._tasks.pop(event.stage))
            return
        if event.stage not in self._tasks:
            self._tasks[event.stage] = self._bars.add_task(event.stage, total=None, rate="", left="")
        rate = ", ".join(f"{value:,.0f} {name}/s" for name, value in list(event.rate.items())[:SHOWN_RATES])
        left = "" if event.eta_s is None else f"{timedelta(seconds=round(event.eta_s))} to go"
        self._bars.update(self._tasks[event.stage], total=event.total or None, completed=event.done, rate=rate, left=left)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _TerminatedError
