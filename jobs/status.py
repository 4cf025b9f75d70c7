"""``vecmill status``: commits, artifacts, who writes and how far, the last runs, what a reindex would do."""

from datetime import timedelta
from typing import Any

from rich.table import Table

from jobs.options import ConfigOption, JsonOption, SetOption, VerboseOption, command, print_json, results
from pipeline.artifacts.artifact import MANIFEST
from pipeline.artifacts.live import known_files
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.ingest.units import count_done, identify_files, plan_units
from pipeline.root.job import plan_job
from pipeline.root.journal import last_runs
from pipeline.root.log import Log, LogEntry, last_beat
from pipeline.root.manifest import ArtifactManifest, load
from pipeline.root.storage import Storage

SHOWN_RUNS = 5


@command
def status(
    config: ConfigOption, overrides: SetOption = None, as_json: JsonOption = False, verbose: VerboseOption = False
) -> None:
    """Show commits, artifacts with their sizes, runs, the writer if there is one, and what a reindex would read."""
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
        "writer": holder.who if holder else None,
        "commits": [
            {"number": entry.number, "artifact": entry.artifact, "at": entry.at, "run": entry.run}
            for entry in log.entries
            if entry.kind == "commit"
        ],
        "artifacts": _artifacts(storage),
        "runs": _runs(storage, holder),
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
            "bytes": sum(file.size_bytes for file in manifest.all_files.values()),
            "index": manifest.index.kind,
            "recall": manifest.evaluation.recall,
            "verdict": manifest.verdict,
        }
        for manifest in manifests
        if manifest is not None
    ]


def _runs(storage: Storage, holder: LogEntry | None) -> list[dict[str, Any]]:
    """The last runs, latest first. One that wrote no end and holds the root no more has died."""
    found = []
    for run in last_runs(storage, SHOWN_RUNS):
        is_live = holder is not None and holder.run == run.run
        state = "died" if run.state == "running" and not is_live else run.state
        seen = (last_beat(storage, holder) if holder and is_live else None) or run.at
        found.append(run.model_dump(mode="json", exclude={"format"}) | {"state": state, "seen": max(seen, run.at)})
    return found


def _next(settings: Config, storage: Storage) -> dict[str, int]:
    """Input files and the ingest units that the next reindex would have to read."""
    job = plan_job(settings, on_gpu=False)
    listed = identify_files(settings, known_files(storage))
    units = plan_units(listed.chosen, settings, job.spec.space)
    counts = {"files": len(listed.chosen), "ignored_files": len(listed.ignored), "units": len(units)}
    return counts | {"units_to_ingest": len(units) - count_done(storage, units)}


def _show(found: dict[str, Any]) -> None:
    results.print(f"root      {found['root']}", markup=False)
    results.print(f"live      {found['live'] or 'nothing yet'}", markup=False)
    for item in found["artifacts"]:
        if item["artifact"] == found["live"]:
            results.print(f"index     {item['verdict']}", markup=False)
    results.print(f"writer    {found['writer'] or 'nobody'}", markup=False)
    upcoming = found["next"]
    ignored = f", {upcoming['ignored_files']} files ignored" if upcoming["ignored_files"] else ""
    results.print(f"next      {upcoming['units_to_ingest']} of {upcoming['units']} ingest units changed or new{ignored}")
    _show_runs(found["runs"])
    table = Table("artifact", "created", "documents", "passages", "MB", "index", "recall", "commits", box=None)
    for item in found["artifacts"]:
        numbers = ", ".join(str(commit["number"]) for commit in found["commits"] if commit["artifact"] == item["artifact"])
        counts = (str(item["documents"]), str(item["passages"]), f"{item['bytes'] / 1e6:.1f}")
        table.add_row(item["artifact"], item["created"], *counts, item["index"], f"{item['recall']:.4f}", numbers)
    results.print(table)


def _show_runs(runs: list[dict[str, Any]]) -> None:
    for run in runs:
        results.print(
            f"run       {run['run']} {run['state']}, last sign of life {run['seen']} {run['why']}".rstrip(), markup=False
        )
        for stage in run["stages"] if run["state"] == "running" else ():
            rates = [f"{value:,.0f} {name}/s" for name, value in stage["rate"].items()]
            left = [f"{timedelta(seconds=round(stage['eta_s']))} to go"] if stage["eta_s"] is not None else []
            words = [f"{stage['done']} of {stage['total']}", *rates, *left] if stage["total"] else ["started"]
            results.print(f"          {stage['stage']}: {stage['message'] or ', '.join(words)}", markup=False)
