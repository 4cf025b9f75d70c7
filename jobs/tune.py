"""``vecmill tune`` and ``vecmill report``: what search settings find, and how fast."""

from typing import Any

from rich.table import Table

from jobs.options import ConfigOption, JsonOption, QuietOption, SetOption, VerboseOption, command, print_json, progress, results
from pipeline.config_file import load_config
from pipeline.manifest import ArtifactManifest
from pipeline.publish import require_live
from pipeline.storage import Storage


@command
def tune(
    config: ConfigOption,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure the live artifact's search settings again, on this machine, and commit the best; its files stay."""
    from pipeline import run

    settings = load_config(config, tuple(overrides or ()))
    with progress(quiet=quiet) as say:
        _show(run.tune(settings, say=say), as_json=as_json)


@command
def report(
    config: ConfigOption, overrides: SetOption = None, as_json: JsonOption = False, verbose: VerboseOption = False
) -> None:
    """Show the live artifact's index and its operating points: recall against time, as last measured."""
    settings = load_config(config, tuple(overrides or ()))
    _show(require_live(Storage(settings.root, settings.store)), as_json=as_json)


def _show(manifest: ArtifactManifest, *, as_json: bool) -> None:
    found, index = manifest.evaluation, manifest.index
    size_bytes = sum(manifest.files[part.name].size_bytes for part in manifest.parts)
    passages = manifest.counts["passages"]
    described: dict[str, Any] = {
        "artifact": manifest.version,
        "passages": passages,
        "dim": manifest.dim,
        "index": index.model_dump(include={"kind", "why", "nlist", "m", "nbits", "opq", "factory"}),
        "parts": len(manifest.parts),
        "bytes_per_vector": round(size_bytes / max(1, passages), 1),
        "rescore": manifest.rescore,
        "recall": {"k": found.k, "low": found.recall_low, "high": found.recall_high, "queries": found.queries},
        "point": found.point.model_dump(),
        "points": [point.model_dump() for point in found.points],
    }
    if as_json:
        print_json(described)
        return
    shape = f", nlist {index.nlist}" * bool(index.nlist) + f", m {index.m}, {index.nbits} bits" * bool(index.m)
    size = (
        f"{described['bytes_per_vector']} bytes per vector in {len(manifest.parts)} part(s), re-scored from {manifest.rescore}"
    )
    results.print(f"artifact {manifest.version}: {passages} passages of {manifest.dim} dimensions", markup=False)
    results.print(f"index    {index.kind}{shape}; {size}", markup=False)
    measured = f"recall@{found.k} over {found.queries} {found.source}, one query at a time on one thread"
    results.print(f"measured {measured}; * is what search uses", markup=False)
    table = Table("", "recall", "ms", "nprobe", "rescore", box=None)
    for point in found.points:
        chosen = "*" if point == found.point else ""
        table.add_row(chosen, f"{point.recall:.4f}", f"{point.latency_ms:.2f}", str(point.nprobe), str(point.rescore))
    results.print(table)
