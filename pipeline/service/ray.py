"""The same app as a Ray Serve application: ``vecmill serve --ray``, or ``pipeline.service.ray:build`` in a RayService.

Each replica holds the index, follows the log by itself and has metrics of its own. With ``partitions`` the index is held by
deployments of their own instead, see pipeline.service.router.
"""

import os
import signal
import threading
from typing import Any

from ray import serve
from starlette.types import ASGIApp

from pipeline.config import Config, S3Config, ServeConfig
from pipeline.operations.submission import secret_environment

NAME = "vecmill"
PATIENCE = ("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
"""Serve kills its own proxy when it is not up after 5 s, which is soon on a busy machine."""
KNOWN = {"config", "overrides", "artifact", "replicas", "partitions", "cpus", "memory", "no_auth"}


def build(args: dict[str, Any]) -> serve.Application:
    """``args``: ``config`` (path), ``overrides`` (list of a.b=value), ``artifact`` (URI), ``replicas``, ``cpus`` per replica.

    ``partitions``: of the index, each with so many replicas; ``memory``: bytes of a node that a replica with an index takes, by
    which Ray spreads them. Raises ConfigError at once where the config is wrong or the artifact has fewer index files than
    partitions, and where there is no token and ``no_auth`` is not said: whoever runs Serve decides on which address it listens.
    The token is $VECMILL_TOKEN of the process that calls; only its hash goes to the replicas. Keys of ``store.s3`` do not go
    there: replicas have them in their environment.
    """
    from pipeline.config_file import load_config
    from pipeline.errors import ConfigError
    from pipeline.service.gate import digest_of

    if unknown := set(args) - KNOWN:
        raise ConfigError(f"serve: unknown argument {min(unknown)}, known are {', '.join(sorted(KNOWN))}")
    config = load_config(args["config"], tuple(args.get("overrides", ()))) if args.get("config") else None
    artifact, token = args.get("artifact"), digest_of(os.environ.get("VECMILL_TOKEN"))
    if config is None and artifact is None:
        raise ConfigError("serve: give config (a path) or artifact (a URI)")
    if token is None and not args.get("no_auth"):
        raise ConfigError("serve: set $VECMILL_TOKEN, or say no_auth to answer anybody who reaches Serve's address")
    count = int(args.get("partitions") or 1)
    if count > 1:
        from pipeline.artifacts.live import manifest_of
        from pipeline.search.partition import share_of

        share_of(manifest_of(config, artifact), 0, count)
    if config is not None:
        config = config.model_copy(update={"store": config.store.model_copy(update={"s3": without_keys(config.store.s3)})})
    return _partitioned(args, config, token) if count > 1 else _whole(args, config, token)


def _whole(args: dict[str, Any], config: Config | None, token: bytes | None) -> serve.Application:
    artifact = args.get("artifact")

    def app() -> ASGIApp:
        from pipeline.service.app import make_app
        from pipeline.service.engine import Engine

        return make_app(Engine(config, artifact), token)

    options = _options(args, config) | {"ray_actor_options": _resources(args, holds_index=True)}
    deployment = serve.deployment(serve.ingress(app)(), name=NAME, max_queued_requests=_limit(config), **options)
    return deployment.bind()


def _partitioned(args: dict[str, Any], config: Config | None, token: bytes | None) -> serve.Application:
    from pipeline.service.router import PartitionReplica, Router

    artifact, count, options = args.get("artifact"), int(args["partitions"]), _options(args, config)
    held = options | {"ray_actor_options": _resources(args, holds_index=True)}
    partitions = [
        serve.deployment(PartitionReplica, name=f"partition-{number}", **held).bind(config, artifact, number, count)
        for number in range(count)
    ]
    routing = options | {"ray_actor_options": _resources(args, holds_index=False)}
    router = serve.deployment(Router, name=NAME, max_queued_requests=_limit(config), **routing)
    return router.bind(config, artifact, token, *partitions)


def _options(args: dict[str, Any], config: Config | None) -> dict[str, Any]:
    """What all deployments have. ``max_ongoing_requests``: the app refuses by itself what is too much."""
    replicas = int(args.get("replicas", 1))
    return {"num_replicas": replicas, "max_replicas_per_node": 1, "max_ongoing_requests": _limit(config)}


def _limit(config: Config | None) -> int:
    return (config.serve if config else ServeConfig()).queue * 2


def _resources(args: dict[str, Any], *, holds_index: bool) -> dict[str, float]:
    memory = {"memory": float(args["memory"])} if holds_index and args.get("memory") else {}
    return {"num_cpus": float(args.get("cpus", 1)), **memory}


def without_keys(s3: S3Config) -> S3Config:
    """Where the store is, without who may use it; put into the environment of this process and those it starts."""
    for name, value in secret_environment(s3).items():
        os.environ.setdefault(name, value)
    return s3.model_copy(update={"key": None, "secret": None})


def run(args: dict[str, Any], host: str, port: int) -> None:
    """Serve on a Ray that is there, else on a local one, until a signal comes; then only this application ends."""
    application = build(args)
    os.environ.setdefault(*PATIENCE)
    handler = signal.getsignal(signal.SIGTERM)
    serve.start(http_options={"host": host, "port": port})
    signal.signal(signal.SIGTERM, handler)  # Ray installs one of its own, which exits in the middle of things
    try:
        serve.run(application, name=NAME)
        threading.Event().wait()
    finally:
        serve.delete(NAME)
