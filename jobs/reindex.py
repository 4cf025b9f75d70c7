"""``vecmill reindex`` and its parts ``ingest``, ``embed``, ``index``."""

import contextlib
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.options import (
    ConfigOption,
    EventsOption,
    LimitOption,
    QuietOption,
    SetOption,
    VerboseOption,
    command,
    exit_code,
    messages,
    print_result,
    progress,
)
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.errors import VecmillError
from pipeline.ingest.documents import FATES
from pipeline.metrics import (
    INDEX_NTOTAL,
    RECALL,
    RUN_ENCODED,
    RUN_EXIT_CODE,
    RUN_RETRIES,
    RUN_ROWS,
    RUN_SECONDS,
    RUN_TIME,
    Metric,
)
from pipeline.root.job import Event, Meter, Say, new_run_id
from pipeline.root.manifest import ArtifactManifest
from pipeline.root.result import RunResult, check_name, one_line, write_result
from pipeline.root.storage import Storage

if TYPE_CHECKING:
    from pipeline.run import Outcome


@command
def reindex(
    config: ConfigOption,
    overrides: SetOption = None,
    limit: LimitOption = None,
    no_publish: Annotated[bool, typer.Option("--no-publish", help="Build the artifact but do not put it live")] = False,
    name: Annotated[str | None, typer.Option("--run", help="Name of the run; runs/NAME/result.json says how it ended")] = None,
    metrics_file: Annotated[
        Path | None, typer.Option("--metrics-file", help="Write the run's metrics there for node-exporter's textfile collector")
    ] = None,
    as_json: EventsOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Bring the index up to date with the corpus: the whole job, idempotent and resumable."""
    settings = load_config(config, tuple(overrides or ()))
    with progress(quiet=quiet, as_json=as_json) as say, _measured(metrics_file) as ended:
        outcome = _recorded(settings, name, say, limit=limit, go_live=not no_publish)
        ended.append(outcome)
        if outcome.retries:
            Meter(outcome.run, say)(Event("storage", f"{outcome.retries} requests to the object store were made again"))
    if as_json:
        print_result(
            {
                "run": outcome.run,
                "snapshot": outcome.snapshot.snapshot,
                "counts": outcome.snapshot.counts,
                "encoded": outcome.encoded,
                "trained": outcome.trained,
                "index_shards": outcome.index_shards,
                "committed": outcome.committed,
                "retries": outcome.retries,
                "built": _summary(outcome.built),
                "live": _summary(outcome.live),
            }
        )


def _recorded(config: Config, name: str | None, say: Say, *, limit: int | None, go_live: bool) -> "Outcome":
    """A run that leaves its result under the root, whatever its end."""
    from pipeline import run

    storage = Storage(config.root, config.store)
    if name is not None:
        check_name(storage, name)
    run_id, started = name or new_run_id(), datetime.now(UTC)
    try:
        outcome = run.reindex(config, limit=limit, go_live=go_live, say=say, run_id=run_id)
    except BaseException as error:
        code, ended = exit_code(error), datetime.now(UTC)
        with contextlib.suppress(VecmillError):  # a root that cannot be written to must not hide what went wrong
            write_result(storage, RunResult(run=run_id, exit_code=code, error=one_line(error), started=started, ended=ended))
        raise
    counts = outcome.snapshot.counts | {"encoded": outcome.encoded, "index_shards": outcome.index_shards}
    result = RunResult(
        run=run_id,
        exit_code=0,
        artifact=outcome.live.version if outcome.live else None,
        committed=outcome.committed,
        counts=counts | {"retries": outcome.retries},
        started=started,
        ended=datetime.now(UTC),
    )
    if not write_result(storage, result):
        messages.print(f"reindex: another run has left its result as {run_id}; this one is done", markup=False)
    return outcome


@command
def ingest(
    config: ConfigOption,
    overrides: SetOption = None,
    limit: LimitOption = None,
    as_json: EventsOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Only read, check and split the corpus: the snapshot."""
    from pipeline import run

    settings = load_config(config, tuple(overrides or ()))
    with progress(quiet=quiet, as_json=as_json) as say:
        snapshot = run.ingest_only(settings, limit=limit, say=say)
    if as_json:
        print_result({"snapshot": snapshot.snapshot, "counts": snapshot.counts})


@command
def embed(
    config: ConfigOption,
    overrides: SetOption = None,
    limit: LimitOption = None,
    as_json: EventsOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Only the snapshot and its embeddings."""
    from pipeline import run

    settings = load_config(config, tuple(overrides or ()))
    with progress(quiet=quiet, as_json=as_json) as say:
        encoded = run.embed_only(settings, limit=limit, say=say)
    if as_json:
        print_result({"encoded": encoded})


@command
def index(
    config: ConfigOption,
    overrides: SetOption = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Train for this corpus and merge anew even where what is live would do")
    ] = False,
    as_json: EventsOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Only train, add, merge, evaluate and publish, over embeddings that exist."""
    from pipeline import run

    settings = load_config(config, tuple(overrides or ()))
    with progress(quiet=quiet, as_json=as_json) as say:
        outcome = run.reindex(settings, encode=False, rebuild=rebuild, say=say)
    if as_json:
        print_result({"index_shards": outcome.index_shards, "committed": outcome.committed, "live": _summary(outcome.live)})


@contextlib.contextmanager
def _measured(file: Path | None) -> Iterator[list["Outcome"]]:
    """Write the metrics of a run when it ends, well or not; its outcome, if it has one, is put into the list."""
    outcomes: list[Outcome] = []
    started, code = time.monotonic(), 1
    try:
        yield outcomes
        code = 0
    except BaseException as error:
        code = exit_code(error)
        raise
    finally:
        if file is not None:
            try:
                _write_metrics(file, code, time.monotonic() - started, outcomes)
            except VecmillError as error:  # how the run ended is said by the run
                messages.print(f"vecmill: {error}", markup=False)


def _write_metrics(file: Path, code: int, seconds: float, outcomes: list["Outcome"]) -> None:
    from pipeline.operations.exposition import Meters

    took = {RUN_EXIT_CODE: float(code), RUN_TIME: time.time(), RUN_SECONDS: seconds}
    found = _levels(outcomes[0]) if outcomes else {}
    meters = Meters([*took, *found, *([RUN_ROWS] if outcomes else [])])  # what is not known is left out, not 0
    for metric, value in (took | found).items():
        meters.level(metric, value)
    for status in FATES if outcomes else ():
        meters.level(RUN_ROWS, outcomes[0].snapshot.counts.get(status, 0), status=status)
    meters.write(file)


def _levels(outcome: "Outcome") -> dict[Metric, float]:
    levels = {RUN_ENCODED: float(outcome.encoded), RUN_RETRIES: float(outcome.retries)}
    if outcome.live is not None:
        levels |= {INDEX_NTOTAL: outcome.live.counts["passages"], RECALL: outcome.live.evaluation.recall}
    return levels


def _summary(manifest: ArtifactManifest | None) -> dict[str, Any] | None:
    if manifest is None:
        return None
    found = manifest.evaluation
    return {
        "artifact": manifest.version,
        "passages": manifest.counts["passages"],
        "index": {"kind": manifest.index.kind, "nlist": manifest.index.nlist, "m": manifest.index.m, "why": manifest.index.why},
        "trained": manifest.index.trained,
        "recall": {
            "k": found.k,
            "mean": found.recall,
            "low": found.recall_low,
            "high": found.recall_high,
            "queries": found.queries,
        },
        "point": found.point.model_dump(),
        "health": found.health.model_dump() if found.health else None,
        "verdict": manifest.verdict,
        "labelled": found.labelled,
    }
