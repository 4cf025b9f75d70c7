"""The same app as a Ray Serve application: ``vecmill serve --ray``, or ``pipeline.service.ray:build`` in a RayService.

Each replica holds the index, follows the log by itself and has metrics of its own.
"""

import os
import signal
import threading
from typing import Any

from ray import serve
from starlette.types import ASGIApp

from pipeline.config import S3Config

NAME = "vecmill"
PATIENCE = ("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
"""Serve kills its own proxy when it is not up after 5 s, which is soon on a busy machine."""
KNOWN = {"config", "overrides", "artifact", "replicas", "cpus", "no_auth"}


def build(args: dict[str, Any]) -> serve.Application:
    """``args``: ``config`` (path), ``overrides`` (list of a.b=value), ``artifact`` (URI), ``replicas``, ``cpus`` per replica.

    Raises ConfigError at once where the config is wrong, and where there is no token and ``no_auth`` is not said: whoever runs
    Serve decides on which address it listens. The token is $VECMILL_TOKEN of the process that calls; only its hash goes to the
    replicas. Keys of ``store.s3`` do not go there: replicas have them in their environment.
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
    if config is not None:
        config = config.model_copy(update={"store": config.store.model_copy(update={"s3": without_keys(config.store.s3)})})
    limit = (config.serve.queue if config else 256) * 2

    def app() -> ASGIApp:
        from pipeline.service.app import make_app
        from pipeline.service.engine import Engine

        return make_app(Engine(config, artifact), token)

    deployment = serve.deployment(
        serve.ingress(app)(),
        name=NAME,
        num_replicas=int(args.get("replicas", 1)),
        max_replicas_per_node=1,
        max_ongoing_requests=limit,
        max_queued_requests=limit,
        ray_actor_options={"num_cpus": float(args.get("cpus", 1))},
    )
    return deployment.bind()


def without_keys(s3: S3Config) -> S3Config:
    """Where the store is, without who may use it; put into the environment of this process and those it starts."""
    if s3.key and s3.secret:
        os.environ.setdefault("AWS_ACCESS_KEY_ID", s3.key.get_secret_value())
        os.environ.setdefault("AWS_SECRET_ACCESS_KEY", s3.secret.get_secret_value())
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
