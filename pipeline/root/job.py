"""What every stage of a run shares: config, storages, the resolved encoder, room for files, a way to tell progress."""

import contextlib
import fcntl
import functools
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from pipeline.config import Config
from pipeline.encoding.model import EncoderSpec, ModelFolder, find_model, resolve_spec
from pipeline.encoding.numerics import resolve_backend, resolve_precision
from pipeline.errors import ConfigError, StorageError
from pipeline.root import layout
from pipeline.root.manifest import Record, list_records
from pipeline.root.storage import Storage

P = ParamSpec("P")
R = TypeVar("R")

ALIVE = ".alive"
"""The file in a scratch folder whose lock its process holds."""
BEGINNING_S = 60.0


@dataclass(frozen=True)
class Event:
    """Something a person or a log wants to know. ``done`` of ``total`` units; ``counts`` are sums so far.

    Without message and total it says that a stage begins, ``ended``: that it is over. The rest is for a Meter to fill in:
    ``rate`` is what was counted per second since the first result, so that no start-up is in it, ``eta_s`` follows from that.
    """

    stage: str
    message: str = ""
    done: int = 0
    total: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    ended: bool = False
    run: str = ""
    at: str = ""
    elapsed_s: float = 0.0
    rate: dict[str, float] = field(default_factory=dict)
    eta_s: float | None = None

    @property
    def is_progress(self) -> bool:
        """Whether the next event of its stage says all that this one does."""
        return bool(self.total) and not self.message and not self.ended

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON lines."""
        return asdict(self)


Say = Callable[[Event], None]


class Meter:
    """Passes events on with the run, the time, the rate and the time to go filled in."""

    def __init__(self, run: str, *says: Say) -> None:
        self._run = run
        self._says = says
        self._began: dict[str, float] = {}
        self._first: dict[str, tuple[float, dict[str, int]]] = {}

    def __call__(self, event: Event) -> None:
        """Fill in and pass on."""
        now = time.monotonic()
        if event.stage not in self._began:
            self._first.pop(event.stage, None)
        elapsed = now - self._began.setdefault(event.stage, now)
        counts = event.counts | {"done": event.done} if event.is_progress and event.done else {}
        since, before = self._first.setdefault(event.stage, (now, counts)) if counts else (now, {})
        rate = {name: (count - before.get(name, 0)) / (now - since) for name, count in counts.items()} if now > since else {}
        pace = rate.pop("done", 0.0)
        eta_s = (event.total - event.done) / pace if pace else None
        if event.ended:
            del self._began[event.stage]
        at = datetime.now(UTC).isoformat(timespec="seconds")
        told = replace(event, run=self._run, at=at, elapsed_s=elapsed, rate=rate, eta_s=eta_s)
        for say in self._says:
            say(told)

    def also(self, say: Say) -> "Meter":
        """One that tells somebody else too."""
        return Meter(self._run, *self._says, say)


@dataclass(frozen=True)
class Job:
    """One run. ``run_id`` names its records; nothing else depends on it. ``stages_s``: wall time of each stage so far."""

    config: Config
    spec: EncoderSpec
    model: ModelFolder
    storage: Storage
    embeddings: Storage
    run_id: str
    say: Meter
    stages_s: dict[str, float] = field(default_factory=dict)

    @property
    def scratch_parent(self) -> str | None:
        """Where files in the making are: as configured, else on a local root, where they only have to be renamed."""
        return self.config.compute.scratch or (self.storage.uri if self.storage.is_local else None)

    @property
    def embedding_folder(self) -> str:
        """Folder of this encoder's shards in the embedding store."""
        return self.spec.fingerprint

    def embedding_records(self) -> list[Record]:
        """Records of this encoder's shards, by unit name."""
        return list(list_records(self.embeddings, self.embedding_folder).values())


def stage(
    name: str,
) -> Callable[[Callable[Concatenate[Job, P], R]], Callable[Concatenate[Job, P], R]]:
    """A stage of a run: its begin and its end are told, its wall time is kept in ``Job.stages_s``."""

    def wrap(function: Callable[Concatenate[Job, P], R]) -> Callable[Concatenate[Job, P], R]:
        @functools.wraps(function)
        def timed(job: Job, /, *args: P.args, **kwargs: P.kwargs) -> R:
            started = time.perf_counter()
            job.say(Event(name))
            try:
                return function(job, *args, **kwargs)
            finally:
                job.stages_s[name] = job.stages_s.get(name, 0.0) + time.perf_counter() - started
                job.say(Event(name, ended=True))

        return timed

    return wrap


def plan_job(config: Config, *, on_gpu: bool, say: Say = lambda _: None, run_id: str | None = None) -> Job:
    """Resolve the encoder for encoders with or without GPUs and open the storages. Writes nothing.

    Raises ConfigError for an unknown model or precision.
    """
    folder = find_model(config.encoder.model, config.encoder.revision)
    precision = resolve_precision(config.encoder.precision, on_gpu=on_gpu, overflows=folder.overflows)
    backend = resolve_backend(_backend(config, folder), folder, on_gpu=on_gpu, precision=precision)
    spec, model = resolve_spec(**config.encoder_request(), precision=precision, backend=backend)
    storage = Storage(config.root, config.store)
    run = run_id or new_run_id()
    return Job(config, spec, model, storage, embedding_store(storage, config), run, Meter(run, say))


def embedding_store(storage: Storage, config: Config) -> Storage:
    """Where the embedding shards of a root are, by encoder: a folder of it, or what it shares with other roots."""
    return Storage(config.store.embeddings or storage.at(layout.EMBEDDINGS), config.store)


def _backend(config: Config, folder: ModelFolder) -> str:
    """What the config asks for: of late chunking torch, which tells the vectors of tokens."""
    if not config.passages.late:
        return config.encoder.backend
    if not folder.mean_pooled or config.encoder.backend == "openvino":
        raise ConfigError(
            f"passages.late: needs a plain transformer pooled by the mean of its tokens, on torch; {config.encoder.model} on "
            f"{config.encoder.backend} is none; set passages.late: false"
        )
    return "torch"


def new_run_id() -> str:
    """Name of a run: when it began, and something that no other has."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"


@contextlib.contextmanager
def scratch(parent: str | None) -> Iterator[Path]:
    """A local folder for files in the making, gone afterwards. ``parent``: the folder that it is in, None: the system's own.

    What processes of this machine that were killed have left there goes first: a disk would fill with it, night by night.
    Raises StorageError where the block cannot write.
    """
    parent = parent or tempfile.gettempdir()
    try:
        Path(parent).mkdir(parents=True, exist_ok=True)
        prefix = f".scratch-{socket.gethostname()}@"
        for left in Path(parent).glob(f"{prefix}*"):
            _remove_left(left)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as folder, _alive(Path(folder)):
            yield Path(folder)
    except OSError as error:
        free = shutil.disk_usage(parent).free if Path(parent).is_dir() else 0
        raise StorageError(
            f"{parent}: cannot write files in the making, {error}, {free} bytes are free; make room or set compute.scratch"
        ) from error


@contextlib.contextmanager
def _alive(folder: Path) -> Iterator[None]:
    """Hold the lock in a folder, where its file system has locks; the end of this process releases it."""
    with (folder / ALIVE).open("a") as handle:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _remove_left(folder: Path) -> None:
    """Remove what a process of this machine that was killed has left; one that has just begun may hold no lock yet."""
    with contextlib.suppress(OSError):
        if time.time() - folder.stat().st_mtime < BEGINNING_S:
            return
        with (folder / ALIVE).open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
