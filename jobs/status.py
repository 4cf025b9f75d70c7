"""``vecmill status``: commits, artifacts, who writes, what a reindex would do."""

from typing import Any

from rich.table import Table

from jobs.options import ConfigOption, JsonOption, SetOption, VerboseOption, command, print_json, results
from pipeline.artifact import MANIFEST
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.job import plan_job
from pipeline.live import known_files
from pipeline.log import Log
from pipeline.manifest import ArtifactManifest, load
from pipeline.storage import Storage
from pipeline.units import count_done, identify_files, plan_units


@command
def status(
    config: ConfigOption, overrides: SetOption = None, as_json: JsonOption = False, verbose: VerboseOption = False
) -> None:
    """Show commits, artifacts with their sizes, the writer if there is one, and what a reindex would read."""
    settings = load_config(config, tuple(overrides or ()))
    found = _status(settings)
    if as_json:
        print_json(found)
    else:
        _show(found)


def _status(settings: Config) -> dict[str, Any]:
    storage = Storage(settings.root, settings.store)
    log = Log(storage).refresh()
    live, holder = log.live, log.holder
    return {
        "root": storage.uri,
        "live": live.artifact if live else None,
        "writer": f"{holder.holder}, run {holder.run}, since {holder.at}" if holder else None,
        "commits": [
            {"number": entry.number, "artifact": entry.artifact, "at": entry.at, "run": entry.run}
            for entry in log.entries
            if entry.kind == "commit"
        ],
        "artifacts": _artifacts(storage),
        "next": _next(settings, storage),
    }


def _artifacts(storage: Storage) -> list[dict[str, Any]]:
    folders = storage.list("artifacts")
    manifests = (load(ArtifactManifest, storage, f"{folder}/{MANIFEST}") for folder in folders)
    return [
        {
            "artifact": manifest.version,
            "created": manifest.created,
            "documents": manifest.counts["documents"],
            "passages": manifest.counts["passages"],
            "bytes": sum(file.size_bytes for file in manifest.files.values()),
            "index": manifest.index.kind,
            "recall": manifest.evaluation.recall,
            "verdict": manifest.verdict,
        }
        for manifest in manifests
        if manifest is not None
    ]


def _next(settings: Config, storage: Storage) -> dict[str, int]:
    """Input files and the ingest units that the next reindex would have to read."""
    job = plan_job(settings, on_gpu=False)
    files = identify_files(settings, known_files(storage)).chosen
    units = plan_units(files, settings, job.spec.space)
    return {"files": len(files), "units": len(units), "units_to_ingest": len(units) - count_done(storage, units)}


def _show(found: dict[str, Any]) -> None:
    results.print(f"root      {found['root']}", markup=False)
    results.print(f"live      {found['live'] or 'nothing yet'}", markup=False)
    for item in found["artifacts"]:
        if item["artifact"] == found["live"]:
            results.print(f"index     {item['verdict']}", markup=False)
    results.print(f"writer    {found['writer'] or 'nobody'}", markup=False)
    results.print(f"next      {found['next']['units_to_ingest']} of {found['next']['units']} ingest units changed or new")
    table = Table("artifact", "created", "documents", "passages", "MB", "index", "recall", "commits", box=None)
    for item in found["artifacts"]:
        numbers = ", ".join(str(commit["number"]) for commit in found["commits"] if commit["artifact"] == item["artifact"])
        counts = (str(item["documents"]), str(item["passages"]), f"{item['bytes'] / 1e6:.1f}")
        table.add_row(item["artifact"], item["created"], *counts, item["index"], f"{item['recall']:.4f}", numbers)
    results.print(table)
