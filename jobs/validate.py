"""``vecmill validate``: the corpus against its contract, before anything is built."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import typer

from jobs.options import (
    ConfigOption,
    JsonOption,
    QuietOption,
    SetOption,
    VerboseOption,
    command,
    print_json,
    progress,
    results,
    write_file,
)
from pipeline.config_file import load_config
from pipeline.errors import DataError
from pipeline.ingest.documents import FATES
from pipeline.ingest.ingestion import REJECTED_SCHEMA
from pipeline.ingest.validation import Validation
from pipeline.ingest.validation import validate as run_validation
from pipeline.root.job import Event
from pipeline.root.shards import parquet_bytes

SHOWN = 10


@command
def validate(
    config: ConfigOption,
    overrides: SetOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Parquet file for all rejected rows")] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Read the whole corpus and tell what a run would reject, and why; needs no model, exit 3 if a run would stop."""
    settings = load_config(config, tuple(overrides or ()))
    with progress(quiet=quiet) as say:
        found = run_validation(settings, each_file=lambda done, total: say(Event("validate", "", done, total)))
    if out:
        table = pa.Table.from_pylist([asdict(row) for row in found.rejected], schema=REJECTED_SCHEMA)
        write_file(out, parquet_bytes(table, compress=True))
    if as_json:
        shown = [asdict(row) for row in found.rejected[:SHOWN]]
        print_json({**vars(found), "rejected": shown, "ok": found.ok})
    else:
        _show(found)
    if not found.ok:
        raise DataError(f"{settings.corpus.uri}: a run would stop, {_why(found)}")


def _why(found: Validation) -> str:
    if found.bad_files:
        return found.bad_files[0]
    if found.counts["rejected"] > found.ceiling:
        return f"{found.counts['rejected']} rows rejected, the ceiling is {found.ceiling}"
    return f"no document in {found.counts['rows']} rows"


def _show(found: Validation) -> None:
    counts = found.counts
    fates = " + ".join(f"{counts[name]} {name}" for name in FATES)
    results.print(f"{found.files} files, {counts['rows']} rows = {fates}", markup=False)
    for uri in found.ignored[:SHOWN]:
        results.print(f"ignored   {uri}", markup=False)
    for text in found.bad_files[:SHOWN]:
        results.print(f"bad file  {text}", markup=False)
    for code, count in sorted(found.codes.items()):
        results.print(f"{code:24} {count}", markup=False)
    for row in found.rejected[:SHOWN]:
        results.print(f"{row.source_uri} row {row.source_row}: {row.code}, {row.message}", markup=False)
