"""``vecmill export``: the live documents with their vectors, for other tools."""

from typing import Annotated

import typer

from jobs.options import ConfigOption, JsonOption, SetOption, VerboseOption, command, print_json, results
from pipeline.config_file import load_config


@command
def export(
    config: ConfigOption,
    out: Annotated[str, typer.Option("--out", help="Parquet file to write, here or in a bucket")],
    overrides: SetOption = None,
    float32: Annotated[bool, typer.Option("--float32", help="float32 instead of float16")] = False,
    no_text: Annotated[bool, typer.Option("--no-text", help="Without the texts")] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write every live document and passage with its vector as Parquet, embeddings as fixed_size_list."""
    from pipeline.artifacts.export import export as run_export

    rows = run_export(load_config(config, tuple(overrides or ())), out, as_float32=float32, with_text=not no_text)
    if as_json:
        print_json({"rows": rows, "file": out})
    else:
        results.print(f"{rows} rows written to {out}", markup=False)
