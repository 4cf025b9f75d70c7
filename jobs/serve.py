"""``vecmill serve``: the live artifact over HTTP."""

import ipaddress
import os
from typing import Annotated

import typer

from jobs.options import SetOption, VerboseOption, command, messages
from jobs.search import NOTHING_NAMED, ArtifactOption, OptionalConfig
from pipeline.config_file import load_config
from pipeline.errors import ConfigError

TOKEN = "VECMILL_TOKEN"  # noqa: S105 - the name of a variable
BACKLOG = 2048
PARTITIONS = "With --ray: the index in so many deployments, for one larger than a node; at most index.partitions"


@command
def serve(
    config: OptionalConfig = None,
    overrides: SetOption = None,
    artifact: ArtifactOption = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on")] = 8000,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Answer anybody who reaches the address")] = False,
    on_ray: Annotated[bool, typer.Option("--ray", help="Run as an application of Ray Serve")] = False,
    partitions: Annotated[int | None, typer.Option("--partitions", min=1, help=PARTITIONS)] = None,
    verbose: VerboseOption = False,
) -> None:
    """Answer searches and embeddings, and follow the log: a new artifact is served without a failed request."""
    if config is None and artifact is None:
        raise ConfigError(NOTHING_NAMED)
    token = os.environ.get(TOKEN)
    if not (token or no_auth or _is_loopback(host)):
        raise ConfigError(f"--host {host}: reached by others than this machine; set ${TOKEN}, or allow all with --no-auth")
    if partitions is not None and not on_ray:
        raise ConfigError("--partitions: each is a deployment of Ray Serve; add --ray")
    if on_ray:
        from pipeline.service import ray

        what = {"config": config, "overrides": overrides or [], "artifact": artifact, "partitions": partitions}
        ray.run(what | {"no_auth": no_auth or _is_loopback(host)}, host, port)
        return
    import uvicorn

    from pipeline.service.app import make_app
    from pipeline.service.engine import Engine
    from pipeline.service.gate import digest_of

    engine = Engine(load_config(config, tuple(overrides or ())) if config else None, artifact)
    served = engine.current.served
    messages.print(f"serve: artifact {served.version}, {engine.model}, on http://{host}:{port}", markup=False)
    uvicorn.run(
        make_app(engine, digest_of(token)),
        host=host,
        port=port,
        backlog=BACKLOG,
        access_log=False,
        log_level="warning",
        ws="none",
    )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
