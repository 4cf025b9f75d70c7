"""``vecmill tune`` and ``vecmill report``: what search settings find, and how fast."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from jobs.options import (
    ConfigOption,
    EventsOption,
    JsonOption,
    QuietOption,
    SetOption,
    VerboseOption,
    command,
    print_json,
    print_result,
    progress,
    results,
    write_file,
)
from pipeline.artifacts.publish import require_live
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.root.manifest import ArtifactManifest
from pipeline.root.storage import Storage

if TYPE_CHECKING:
    from pipeline.reports.compression import Compression


@command
def tune(
    config: ConfigOption,
    report: Annotated[
        Path | None, typer.Option("--report", help="Commit nothing; write a page on what bytes per vector buy to this file")
    ] = None,
    overrides: SetOption = None,
    as_json: EventsOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure the live artifact's search settings again, on this machine, and commit the best; its files stay."""
    from pipeline import run

    settings = load_config(config, tuple(overrides or ()))
    if report is not None:
        _report_compression(settings, report, quiet=quiet, as_json=as_json)
        return
    with progress(quiet=quiet, as_json=as_json) as say:
        manifest = run.tune(settings, say=say)
    if as_json:
        print_result(_described(manifest))
    else:
        _show(manifest)


def _report_compression(settings: Config, file: Path, *, quiet: bool, as_json: bool) -> None:
    from pipeline.reports.compression import compress
    from pipeline.reports.report import render_compression

    with progress(quiet=quiet, as_json=as_json) as say:
        found = compress(settings, say)
    if as_json:
        print_result(found.model_dump())
    else:
        _show_compression(found)
    write_file(file, render_compression(found))


def _show_compression(found: "Compression") -> None:
    table = Table("", "kind", "dim", "bits/dim", "re-scored", "bytes", "on disk", "recall", "nDCG@10", "ms", box=None)
    for row in found.rows:
        quality = "" if row.quality is None else f"{row.quality:.4f}"
        numbers = (f"{row.bits_per_dimension:g}", row.rescore, f"{row.memory_bytes:.1f}", f"{row.disk_bytes:.0f}")
        measured = (f"{row.recall:.4f}", quality, f"{row.latency_ms:.2f}")
        table.add_row("*" if row.is_best else "", row.kind, str(row.dim), *numbers, *measured)
    results.print(table)


@command
def report(
    config: ConfigOption,
    overrides: SetOption = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write the whole report to this file, one page that needs nothing")
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Show the live artifact's index and its operating points: recall against time, as last measured."""
    settings = load_config(config, tuple(overrides or ()))
    storage = Storage(settings.root, settings.store)
    manifest = require_live(storage)
    if html is not None:
        from pipeline.reports.report import render, stored_account

        write_file(html, render(stored_account(storage, manifest)))
    if as_json:
        print_json(_described(manifest))
    else:
        _show(manifest)


def _described(manifest: ArtifactManifest) -> dict[str, Any]:
    found, index = manifest.evaluation, manifest.index
    return {
        "artifact": manifest.version,
        "passages": manifest.counts["passages"],
        "dim": manifest.dim,
        "index": index.model_dump(include={"kind", "why", "nlist", "m", "nbits", "opq", "factory"}),
        "parts": len(manifest.parts),
        "bytes_per_vector": manifest.bytes_per_vector,
        "rescore": manifest.rescore,
        "recall": {"k": found.k, "low": found.recall_low, "high": found.recall_high, "queries": found.queries},
        "point": found.point.model_dump(),
        "points": [point.model_dump() for point in found.points],
    }


def _show(manifest: ArtifactManifest) -> None:
    found, index, described = manifest.evaluation, manifest.index, _described(manifest)
    shape = f", nlist {index.nlist}" * bool(index.nlist) + f", m {index.m}, {index.nbits} bits" * bool(index.m)
    size = (
        f"{described['bytes_per_vector']} bytes per vector in {len(manifest.parts)} part(s), re-scored from {manifest.rescore}"
    )
    results.print(f"artifact {manifest.version}: {described['passages']} passages of {manifest.dim} dimensions", markup=False)
    results.print(f"index    {index.kind}{shape}; {size}", markup=False)
    measured = f"recall@{found.k} over {found.queries} {found.source}, one query at a time on one thread"
    results.print(f"measured {measured}; * is what search uses", markup=False)
    table = Table("", "recall", "ms", "nprobe", "rescore", box=None)
    for point in found.points:
        chosen = "*" if point == found.point else ""
        table.add_row(chosen, f"{point.recall:.4f}", f"{point.latency_ms:.2f}", str(point.nprobe), str(point.rescore))
    results.print(table)
