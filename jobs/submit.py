"""``vecmill submit``: a reindex as a job of a Ray cluster, once for each tick, with our own exit codes.

A job's name says what it does and for which tick, so the same command again finds it: at work, done, or to be tried again.
The submitter only looks on; killing it does not end the job.

Where secrets go: nowhere, if it can be helped. Ray shows a job's entrypoint, metadata and runtime_env to whoever may use its
API, and writes runtime_env into ``runtime_env_agent.log`` of each node; since 2.59 it hides the values of ``env_vars`` from
browsers, and from nobody else. So the config that is uploaded has no secret in it, and keys that stand in ``store.s3`` become
``env_vars``, the one place that Ray treats as secret at all. Whoever may read them there may run code with them anyway. Nodes
with a role, or with keys in their own environment, need none of that; nothing of this process's environment is passed on.
"""

import asyncio
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.options import ConfigOption, JsonOption, QuietOption, SetOption, VerboseOption, command, messages, print_json
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.errors import ConfigError, LockedError, ProcessError, VecmillError
from pipeline.operations.submission import CONFIG_NAME, digest, pack, secret_environment
from pipeline.root.result import RunResult, read_result, scheduled_name
from pipeline.root.storage import Storage

AGENT_WAIT_S = 120.0
"""A head answers before its job agent is up: so long it may take."""
CLUSTER_WAIT_S = 120.0
"""A cluster that answers no more while its job is followed is given up after so long."""
LOG_WAIT_S = 60.0
"""So long a log is followed before the job is asked for its state: a head that lost its network never ends the log."""
PAUSE_S = 2.0
JOB_NAME = re.compile(r"[a-z].*-(\d{8,})")


@command
def submit(
    config: ConfigOption,
    address: Annotated[str | None, typer.Option("--address", help="http://HEAD:8265; default: $RAY_ADDRESS or here")] = None,
    overrides: SetOption = None,
    tick: Annotated[str | None, typer.Option("--tick", help="What this run is for: ISO 8601, or a CronJob's Job")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job and exit as it does")] = True,
    image: Annotated[bool, typer.Option("--image", help="Use the vecmill that the cluster's nodes have")] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run reindex as a job of a Ray cluster, once per tick; exits as the run does, 4 while the tick's job is at work."""
    settings, moment = load_config(config, tuple(overrides or ())), _moment(tick)
    cluster = _Cluster(address, _silent if quiet else _tell, verbose=verbose)
    storage = Storage(settings.root, settings.store)
    run, is_done = _choose(cluster, storage, digest(settings), moment)
    if is_done:
        cluster.tell(f"done already: run {run} of the tick {moment.isoformat()}")
    else:
        cluster.submit(run, settings, with_code=not image)
        cluster.tell(f"job {run} for the tick {moment.isoformat()}")
        if wait:
            _follow(cluster, run, quiet=quiet)
    result = read_result(storage, run) if wait or is_done else None
    if as_json:
        print_json(result.model_dump(mode="json") if result else {"run": run, "exit_code": None})
    if wait and not is_done:
        _exit_as(cluster, run, result)


class _Cluster:
    """The job API of one cluster, its failures told in our words."""

    def __init__(self, address: str | None, tell: Callable[[str], None], *, verbose: bool) -> None:
        from ray.job_submission import JobSubmissionClient

        if not verbose:
            for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
                logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
        if address is not None:
            os.environ["RAY_API_SERVER_ADDRESS"] = address  # the client prefers $RAY_ADDRESS to its own argument
        self.tell = tell
        self.where = address or "Ray"
        with self._explained():
            self.client = JobSubmissionClient(address)
        self.where = str(self.client.get_address())

    def state(self, run: str) -> str | None:
        """PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED; None where there is no such job."""
        with self._explained():
            try:
                return str(self.client.get_job_info(run).status.value)
            except RuntimeError as error:
                if "status code 404" in str(error):
                    return None
                raise

    def message(self, run: str) -> str:
        """What Ray says of the end of a job, in one line and without the log that it adds."""
        with self._explained():
            message = str(self.client.get_job_info(run).message)
        return " ".join(message.partition(", last available logs")[0].split())

    def submit(self, run: str, config: Config, *, with_code: bool) -> None:
        """Upload what the job needs and start it; waits a while for a head that has just come up."""
        secrets = secret_environment(config.store.s3)
        if secrets:
            self.tell("store.s3.key and secret go to the job's environment; nodes with a role would need no secret")
        with tempfile.TemporaryDirectory(prefix="vecmill-job-") as folder:
            pack(Path(folder), config, with_code=with_code)
            environment: dict[str, Any] = {"working_dir": folder} | ({"env_vars": secrets} if secrets else {})
            with self._explained():
                self._submit(run, environment)

    def _submit(self, run: str, environment: dict[str, Any]) -> None:
        entrypoint = f"python -m jobs reindex -c {CONFIG_NAME} --run {run}"
        deadline = time.monotonic() + AGENT_WAIT_S
        while True:
            try:
                self.client.submit_job(entrypoint=entrypoint, submission_id=run, runtime_env=environment)
            except RuntimeError as error:
                if "already exists" in str(error):
                    raise LockedError(f"{self.where}: job {run} of this tick was submitted by somebody else") from error
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(PAUSE_S)
            else:
                return

    @contextmanager
    def _explained(self) -> Iterator[None]:
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise ConfigError(
                f"{self.where}: the cluster wants another token, {error.message.splitlines()[0].rstrip('.: ')}; "
                "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
            ) from error
        except OSError as error:  # requests' own errors among them
            what = f"{self.where}: no cluster answers, {_first_line(error)}"
            raise ProcessError(f"{what}; check --address, or try again") from error
        except RuntimeError as error:
            raise ProcessError(f"{self.where}: the job API refused, {_first_line(error)}; see the head's logs") from error


def _choose(cluster: _Cluster, storage: Storage, what: str, tick: datetime) -> tuple[str, bool]:
    """The run to submit for a tick, or the one that has done it (True); raises LockedError while one is at work.

    The root is asked too: a cluster that was started anew knows no earlier job.
    """
    attempt = 0
    while True:
        attempt += 1
        run = scheduled_name(what, tick, attempt)
        state, result = cluster.state(run), read_result(storage, run)
        if state in {"PENDING", "RUNNING"}:
            raise LockedError(
                f"{cluster.where}: job {run} of this tick is {state}; wait for it, or end it with ray job stop {run}"
            )
        if result is None and state is None:
            return run, False
        if result.exit_code == 0 if result else state == "SUCCEEDED":
            return run, True


def _follow(cluster: _Cluster, run: str, *, quiet: bool) -> None:
    """Return when the job has ended, its log on stderr meanwhile."""
    from aiohttp import ClientError

    log, answered = _Log(cluster.client, run), time.monotonic()
    try:
        while True:
            try:
                if not quiet:
                    with suppress(TimeoutError):
                        asyncio.run(asyncio.wait_for(log.tell(), LOG_WAIT_S))
                if cluster.state(run) not in {"PENDING", "RUNNING"}:
                    return
                answered = time.monotonic()
            except (ClientError, RuntimeError, OSError, VecmillError) as error:
                if time.monotonic() - answered > CLUSTER_WAIT_S:
                    raise ProcessError(f"{cluster.where}: answers no more, job {run} may go on, {error}") from error
            time.sleep(PAUSE_S)
    except BaseException as error:
        if not isinstance(error, Exception):
            _tell(f"job {run} goes on; ray job stop {run} ends it")
        raise


class _Log:
    """A job's log, from where it was told last: a connection that breaks begins it again."""

    def __init__(self, client: Any, run: str) -> None:
        self._client = client
        self._run = run
        self._told = 0

    async def tell(self) -> None:
        """Write it to stderr until the job ends."""
        seen = 0
        async for text in self._client.tail_job_logs(self._run):
            sys.stderr.write(text[max(0, self._told - seen) :])
            sys.stderr.flush()
            seen += len(text)
            self._told = max(self._told, seen)


def _exit_as(cluster: _Cluster, run: str, result: RunResult | None) -> None:
    """Exit with the run's own code; 1 where it was killed before it could say how it ended."""
    if result is None:
        raise ProcessError(
            f"{cluster.where}: job {run} left no result, it was killed or never began: {cluster.state(run)}, "
            f"{cluster.message(run)}; look for lack of memory, then submit it again"
        )
    if result.exit_code:
        _tell(f"run {run} ended with exit code {result.exit_code}: {result.error}")
        raise typer.Exit(result.exit_code)


def _moment(text: str | None) -> datetime:
    """A tick, to the minute, in UTC, which is what a time without an offset is taken for.

    Kubernetes' CronJobs end the names of their Jobs with the scheduled minute since 1970: such a name is a tick too.
    """
    if text and (named := JOB_NAME.fullmatch(text)):
        return datetime.fromtimestamp(60 * int(named[1]), UTC)
    try:
        moment = datetime.fromisoformat(text) if text else datetime.now(UTC)
    except ValueError as error:
        raise ConfigError(f"--tick {text}: expected ISO 8601, as in 2026-11-24T03:00+01:00") from error
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return moment.astimezone(UTC).replace(second=0, microsecond=0)


def _tell(text: str) -> None:
    messages.print(f"submit: {text}", markup=False)


def _silent(text: str) -> None:
    """Nothing but errors."""


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if "Traceback" in lines[0] else 0]
