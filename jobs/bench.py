"""``vecmill bench``: what this machine does with what a config asks for."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from jobs.options import ConfigOption, JsonOption, SetOption, VerboseOption, command, print_json, results
from pipeline.config_file import load_config
from pipeline.encoding.numerics import on_gpu
from pipeline.operations.planning import sample_texts
from pipeline.root.job import plan_job

app = typer.Typer(help="Time a part of the pipeline on this machine.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Time a part of the pipeline on this machine."""


@app.command()
@command
def encoder(
    config: ConfigOption,
    overrides: SetOption = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Also time SentenceTransformer.encode at its best")] = False,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Runs of each, interleaved; the median counts")] = 3,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Time the config's encoder on a sample of its corpus: tokens/s, MFU, cosine to FP32, latency of one query."""
    from pipeline.encoding.encoder_bench import measure

    job = plan_job(load_config(config, tuple(overrides or ())), on_gpu=on_gpu())
    report = asdict(measure(job.spec, sample_texts(job), rounds=rounds, baseline=baseline))
    if as_json:
        print_json(report)
        return
    table = Table(show_header=False, box=None)
    for name, value in report.items():
        table.add_row(f"[bold]{name}", escape(str(value)))
    results.print(table)
