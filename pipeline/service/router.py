"""An artifact larger than one node: its partitions are deployments of Ray Serve, and the app's replicas are routers.

A router holds no index: it encodes queries, asks one replica of every partition and merges the answers. Every question names
its artifact, so an answer is wholly from one; a router turns to a new artifact when all replicas of all partitions have opened
it. A question changes nothing, so one that a replica dies over is put to another.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, cast

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError
from starlette.types import ASGIApp

from pipeline.ann.recall import Matrix, Ordinals
from pipeline.config import Config, ServeConfig
from pipeline.errors import ConfigError, VecmillError
from pipeline.metrics import SERVICE
from pipeline.operations.exposition import Meters
from pipeline.root.manifest import ArtifactManifest, OperatingPoint
from pipeline.search.filters import AnyFilter
from pipeline.search.partition import Depth, Found, Row, ordinals_of, share_of
from pipeline.search.searcher import Searcher
from pipeline.service.app import make_app
from pipeline.service.engine import WAITING_SEARCHES, Engine
from pipeline.service.holding import Holding, Question
from pipeline.service.refusals import RefusedError
from pipeline.service.searches import Searches

ATTEMPTS = 3
"""So many replicas are asked, where the ones before died."""
PAUSE_S = 0.2
"""Before the next one is asked: by then Serve has heard of most deaths."""
START_S = 1.0
"""How often a router looks whether its partitions are up."""

_log = logging.getLogger(__name__)


class PartitionReplica:
    """A replica of one partition."""

    def __init__(self, config: Config | None, artifact: str | None, number: int, count: int) -> None:
        limits = config.serve if config else ServeConfig()
        self._holding = Holding(config, artifact, number, count)
        self._searches = Searches(limits.threads, limits.queue, Meters(SERVICE))

    async def open(self, version: str) -> bool:
        """Have an artifact ready; raises VerificationError where it cannot be."""
        await asyncio.to_thread(self._holding.partition, version)
        return True

    async def answer(self, version: str, question: Question, *arguments: Any) -> Any:
        """What its share of an artifact answers; RefusedError 429 where too much waits."""
        return await asyncio.wrap_future(self._searches.submit(self._answers, (version, question, arguments)))

    def _answers(self, asked: Sequence[tuple[str, Question, tuple[Any, ...]]]) -> list[Any]:
        return [self._holding.answer(*each) for each in asked]


class RemotePartition:
    """A partition of one artifact in other processes. ``handle``: of its deployment."""

    def __init__(self, handle: Any, version: str, ordinals: range, timeout_s: float) -> None:
        self.ordinals = ordinals
        self._handle = handle
        self._version = version
        self._timeout_s = timeout_s

    def dense(self, vectors: Matrix, depth: Depth, wanted: AnyFilter | None) -> Found:
        """See Partition."""
        return cast(Found, self._answer("dense", vectors, depth, wanted))

    def lexical(self, texts: Sequence[str], passages: int, wanted: AnyFilter | None) -> Found:
        """See Partition."""
        return cast(Found, self._answer("lexical", texts, passages, wanted))

    def rows(self, ordinals: Ordinals, wanted: AnyFilter | None) -> dict[int, list[Row]]:
        """See Partition."""
        return cast(dict[int, list[Row]], self._answer("rows", ordinals, wanted))

    def vector_of(self, doc_id: str, passage: int) -> Matrix | None:
        """See Partition."""
        return cast(Matrix | None, self._answer("vector_of", doc_id, passage))

    def _answer(self, question: Question, *arguments: Any) -> Any:
        """Raises what the partition raises, RefusedError 503 where it does not answer."""
        until = time.monotonic() + self._timeout_s
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(PAUSE_S)
            response = self._handle.answer.remote(self._version, question, *arguments)
            try:
                return response.result(timeout_s=max(0.0, until - time.monotonic()))
            except RayTaskError as error:
                raise _refused(error.cause) from error
            except TimeoutError as error:
                response.cancel()
                raise RefusedError(503, "timeout", f"no answer within {self._timeout_s:g} s; come again") from error
            except (RayError, DeploymentUnavailableError) as error:
                _log.warning("%s lost, attempt %d: %s", self._handle.deployment_name, attempt + 1, type(error).__name__)
        raise RefusedError(503, "partition_lost", "a partition of the index does not answer; come again")


def _refused(cause: Exception) -> Exception:
    """What a request is told of an error in a partition: a wrong filter is its own, a broken artifact is not."""
    if isinstance(cause, VecmillError) and not isinstance(cause, ConfigError):
        return RefusedError(503, "partition_broken", f"a partition of the index cannot answer: {cause}")
    return cause


class Partitions:
    """Makes the searcher of an artifact out of the handles of its partitions' deployments."""

    def __init__(self, handles: Sequence[Any], limits: ServeConfig) -> None:
        self._handles = handles
        self._timeout_s = limits.timeout_s
        self._asking = ThreadPoolExecutor((limits.threads or WAITING_SEARCHES) * len(handles), "vecmill-asking")

    def __call__(self, manifest: ArtifactManifest, point: OperatingPoint) -> Searcher:
        """Waits until every replica that is up has opened the artifact. Raises what keeps one from it, ConfigError too."""
        count = len(self._handles)
        held = [ordinals_of(share_of(manifest, number, count).parts) for number in range(count)]
        partitions = [
            RemotePartition(handle, manifest.version, ordinals, self._timeout_s)
            for handle, ordinals in zip(self._handles, held, strict=True)
        ]
        with ThreadPoolExecutor(count) as opening:
            list(opening.map(partial(_open, manifest.version), self._handles))
        return Searcher(partitions, manifest, point, self._asking.map)


def _open(version: str, handle: Any) -> None:
    """Have all replicas of a partition open an artifact. One that dies meanwhile opens what is live when it starts again."""
    while True:
        try:
            found = handle.broadcast("open", version).results(return_exceptions=True)
        except DeploymentUnavailableError:  # none is up yet
            found = []
        for each in found:
            if isinstance(each, RayTaskError):
                raise each.cause
        if True in found:
            return
        time.sleep(START_S)


@serve.ingress()
class Router:
    """A replica of the app without an index. ``handles``: of the partitions' deployments, in order."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: Config | None, artifact: str | None, token: bytes | None, *handles: Any
    ) -> None:
        partitions = Partitions(handles, config.serve if config else ServeConfig())
        engine = await asyncio.to_thread(Engine, config, artifact, partitions)
        self._app = make_app(engine, token)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The app, asked for once by Serve."""
        return self._app
