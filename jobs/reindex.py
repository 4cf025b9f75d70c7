"""``vecmill reindex`` and its parts ``ingest``, ``embed``, ``index``."""

from typing import Annotated, Any

import typer

from jobs.options import (
    ConfigOption,
    EventsOption,
    LimitOption,
    QuietOption,
    SetOption,
    VerboseOption,
    command,
    print_result,
    progress,
)
from pipeline.config_file import load_config
from pipeline.job import Event, Meter
from pipeline.manifest import ArtifactManifest


@command
def reindex(
    config: ConfigOption,
    overrides: SetOption = None,
    limit: LimitOption = None,
    no_publish: Annotated[bool, typer.Option("--no-publish", help="Build the artifact but do not put it live")] = False,
    as_json: EventsOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Bring the index up to date with the corpus: the whole job, idempotent and resumable."""
    from pipeline import run

    settings = load_config(config, tuple(overrides or ()))
    with progress(quiet=quiet, as_json=as_json) as say:
        outcome = run.reindex(settings, limit=limit, go_live=not no_publish, say=say)
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
