"""A Ray to work on: the one that is there, or a local one for the length of a run."""

import contextlib
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import ray

from pipeline.config import ComputeConfig
from pipeline.errors import ConfigError, ProcessError, VecmillError
from pipeline.root import retries

LOCAL_OBJECT_STORE_BYTES = 512 << 20
"""Only token ids and work units pass through the object store."""
TOKENIZER_CPUS = 0.5
"""CPUs that a task books which reads and tokenizes for the encoders."""
STARTS = 3
SLOW_START = "timed out during startup"
DEATHS = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.NodeDiedError,
)
WORKER_ENVIRONMENT = {
    "RAYON_NUM_THREADS": "1",  # the tokenizer's own pool; tasks run side by side instead
    "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "0"),
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}


@dataclass(frozen=True)
class Cluster:
    """What there is to work with: whole cluster and the largest node."""

    nodes: int
    cpus: int
    gpus: float
    node_cpus: int

    def encoders(self, compute: ComputeConfig) -> int:
        """Actors that encode: as configured, else one per GPU share, without GPUs one per node."""
        per_encoder = self.gpus_per_encoder(compute)
        return compute.encoders or (max(1, int(self.gpus // per_encoder)) if per_encoder else self.nodes)

    def gpus_per_encoder(self, compute: ComputeConfig) -> float:
        """GPUs of an encoder: as configured, else 1 where the cluster has any."""
        return compute.gpus_per_encoder if compute.gpus_per_encoder is not None else float(self.gpus > 0)

    def threads(self, compute: ComputeConfig) -> int:
        """Threads of an encoder: as configured, else its share of a node."""
        return compute.cpus_per_encoder or max(1, self.node_cpus // self._encoders_per_node(compute))

    def reserved_cpus(self, compute: ComputeConfig) -> float:
        """CPUs that an encoder books with Ray: its share of a node less what one tokenizer task books there.

        Encoders that booked every CPU would wait for ever for the tasks that feed them. Beside a GPU one is enough.
        """
        share = (self.node_cpus - TOKENIZER_CPUS) / self._encoders_per_node(compute)
        share = float(int(share)) if share >= 1 else int(100 * share) / 100
        return min(1.0, share) if self.gpus_per_encoder(compute) else share

    def _encoders_per_node(self, compute: ComputeConfig) -> int:
        return -(-self.encoders(compute) // self.nodes)


@contextlib.contextmanager
def connected(compute: ComputeConfig) -> Iterator[Cluster]:
    """Use Ray for a block: an initialised one, $RAY_ADDRESS or ``compute.address``, else a local one that ends with it.

    Raises ConfigError when the cluster lacks what the encoders ask for, so that nobody waits for it in vain.
    """
    quiet = logging.getLogger().level > logging.DEBUG
    if quiet:
        for name in ("ray", "ray.data", "ray._private"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # errors come as exceptions, or are made good
        # max_restarts has no named parameter yet; the replacement must come before Ray 2.64 (see pyproject.toml)
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
    started = not ray.is_initialized()
    if started:
        _start(compute.address, quiet)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.raise_original_map_exception = True  # Ray's own wrapper loses the cause when it is pickled
        yield _measure(compute)
    finally:
        if started:
            ray.shutdown()


def run_all(task: Callable[..., Any], calls: list[tuple[Any, ...]], *, cpus: float, done: Callable[[Any], None]) -> None:
    """Run Ray tasks, a few more than fit at a time; ``done`` gets each result as it comes. Errors are raised as they are."""
    remote = ray.remote(num_cpus=cpus, max_retries=3)(_counted)
    waiting = list(reversed(calls))
    window = 2 * max(1, int(ray.cluster_resources().get("CPU", 1) // cpus))
    running: list[Any] = []
    while waiting or running:
        while waiting and len(running) < window:
            running.append(remote.remote(task, *waiting.pop()))
        ready, running = ray.wait(running, num_returns=1)
        for reference in ready:
            done(_result(reference))


def run_one(task: Callable[..., Any], *arguments: Any, cpus: float) -> Any:
    """Run one Ray task and return its result."""
    return _result(ray.remote(num_cpus=cpus, max_retries=3)(_counted).remote(task, *arguments))


def _counted(task: Callable[..., Any], *arguments: Any) -> tuple[Any, int]:
    """The result of a task, and how many requests to a store it had to make again."""
    return task(*arguments), retries.taken()


def _result(reference: Any) -> Any:
    """The result of a ``_counted`` task; an error of ours is raised as itself, not wrapped in Ray's."""
    try:
        result, again = ray.get(reference)
    except ray.exceptions.RayError as error:
        raise own_error(error) from error
    retries.add(again)
    return result


def tolerant_rows(dataset: Any, lost: int) -> Iterator[dict[str, Any]]:
    """Rows of a dataset; up to ``lost`` of its blocks may fail, and are then missing."""
    dataset.context.max_errored_blocks = lost
    yield from dataset.iter_rows()


def own_error(error: BaseException) -> BaseException:
    """The VecmillError inside Ray's wrapping, a ProcessError for a death, or the error itself."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, VecmillError) and isinstance(seen, ray.exceptions.RayTaskError):
            kind = next(kind for kind in type(seen).__mro__ if kind.__module__ == VecmillError.__module__)
            return cast(VecmillError, kind(str(getattr(seen, "cause", seen)).splitlines()[0]))
        if isinstance(seen, VecmillError):
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    if isinstance(error, DEATHS):
        first = str(error).strip().splitlines()[0].rstrip(".")
        return ProcessError(
            f"a process of the run died too often: {first}; look for lack of memory, then run the same command again"
        )
    return error


def _start(address: str | None, quiet: bool) -> None:
    address = address or os.environ.get("RAY_ADDRESS")
    if quiet:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    options: dict[str, Any] = {"runtime_env": {"env_vars": WORKER_ENVIRONMENT}, "log_to_driver": not quiet}
    if quiet:
        options["logging_level"] = logging.ERROR
    if address is None:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        options |= {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": LOCAL_OBJECT_STORE_BYTES}
    try:
        with _kept_handlers(), _muted_stderr() if quiet else contextlib.nullcontext():
            _init(address or "local", options)
    except ConnectionError as error:
        raise ConfigError(f"Ray at {address}: no cluster answers; start it or unset compute.address and RAY_ADDRESS") from error


def _init(address: str, options: dict[str, Any]) -> None:
    """``ray.init``, again where a local Ray was not up after Ray's own 30 s: the machine was busy."""
    for attempt in range(1, STARTS + 1):
        try:
            ray.init(address=address, **options)
        except Exception as error:  # Ray has no kind of its own for this
            if SLOW_START not in str(error):
                raise
            ray.shutdown()
            if attempt == STARTS:
                raise ProcessError(
                    f"a local Ray was not up after 30 s, {STARTS} times; look at the load of this machine, then run again"
                ) from error
        else:
            return


@contextlib.contextmanager
def _kept_handlers() -> Iterator[None]:
    """Ray installs a SIGTERM handler of its own, which exits without giving the root back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _muted_stderr() -> Iterator[None]:
    """Keep what Ray's C++ core prints while it starts off the terminal; its failures come as exceptions."""
    saved = os.dup(2)
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _measure(compute: ComputeConfig) -> Cluster:
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if not alive:
        raise ConfigError("Ray: the cluster has no node with a CPU; add one")
    cluster = Cluster(
        nodes=len(alive),
        cpus=int(sum(node["CPU"] for node in alive)),
        gpus=sum(node.get("GPU", 0.0) for node in alive),
        node_cpus=int(max(node["CPU"] for node in alive)),
    )
    wanted = cluster.encoders(compute) * cluster.gpus_per_encoder(compute)
    if wanted > cluster.gpus:
        raise ConfigError(
            f"compute: {wanted:g} GPUs wanted by the encoders, the cluster has {cluster.gpus:g}; lower compute.encoders"
        )
    return cluster
