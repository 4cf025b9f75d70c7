"""``vecmill plan``: the dry run."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from jobs.options import ConfigOption, JsonOption, SetOption, VerboseOption, command, print_json, results
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.job import Job, plan_job
from pipeline.numerics import on_gpu
from pipeline.planning import Plan, make_plan, measure_rate

SHOWN_IGNORED = 3


@command
def plan(
    config: ConfigOption,
    overrides: SetOption = None,
    full: Annotated[bool, typer.Option("--full", help="Read and split the whole corpus, not a sample")] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Show what a reindex would read, build and cost; writes nothing."""
    found, job = _plan(load_config(config, tuple(overrides or ())), full=full)
    if as_json:
        print_json(asdict(found))
    else:
        _show(found, job)


def _plan(config: Config, *, full: bool) -> tuple[Plan, Job]:
    job = plan_job(config, on_gpu=on_gpu())

    def calibrate(texts: Sequence[str]) -> float:
        return measure_rate(job.spec, texts)

    return make_plan(job, calibrate, full=full), job


def _show(found: Plan, job: Job) -> None:
    index = found.index
    size = f", nlist {index.nlist}, trained on {index.train_vectors}" if index.nlist else ""
    size += f", m {index.m}, {index.nbits} bits" if index.m else ""
    rows = {
        "corpus": f"{job.config.corpus.uri}: {found.files} files ({', '.join(found.formats)}), {_mb(found.input_bytes)}",
        "ignored": f"{len(found.ignored)} files: {', '.join(found.ignored[:SHOWN_IGNORED])}",
        "work": f"{found.units} ingest units, {found.units_done} of them done before",
        "documents": f"{found.documents:,} (sampled {found.sampled_documents:,}, of those {found.sampled_rejected} rejected)",
        "passages": f"about {found.passages:,}, {found.tokens:,} tokens, {found.truncated_documents:,} documents truncated",
        "encoder": f"{found.encoder}, {found.dim} dimensions, {found.tokens_per_s:,.0f} tokens/s by {found.rate_source}",
        "encoding": f"about {found.encode_s / 60:.1f} minutes on this machine, if no passage is in the store yet",
        "index": f"{index.kind}{size}; {index.why}",
        "disk": f"embeddings {_mb(found.embedding_bytes)}, artifact about {_mb(found.artifact_bytes)}",
        "memory": f"merge about {_mb(found.merge_memory_bytes)}, search {_mb(found.search_memory_bytes)} and mapped files",
    }
    table = Table(show_header=False, box=None)
    for name, text in rows.items():
        if name == "ignored" and not found.ignored:
            continue
        table.add_row(f"[bold]{name}", text)
    results.print(table)


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"
