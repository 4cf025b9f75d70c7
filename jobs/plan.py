"""``vecmill plan``: the dry run."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from jobs.options import ConfigOption, JsonOption, SetOption, VerboseOption, command, print_json, results
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.encoding.numerics import on_gpu
from pipeline.operations.planning import Plan, make_plan, measure_rate
from pipeline.operations.what_if import WhatIf, parse_cluster, what_if
from pipeline.root.job import Job, plan_job

SHOWN_IGNORED = 3
UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))


@command
def plan(
    config: ConfigOption,
    overrides: SetOption = None,
    full: Annotated[bool, typer.Option("--full", help="Read and split the whole corpus, not a sample")] = False,
    cluster: Annotated[str | None, typer.Option("--cluster", help="Estimate other encoders: 8xL4, 2xA100,4xL4, 16xcpu")] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Show what a reindex would read, build and cost; writes nothing."""
    encoders = parse_cluster(cluster) if cluster is not None else None
    found, job = _plan(load_config(config, tuple(overrides or ())), full=full)
    elsewhere = what_if(encoders, found, job) if encoders else None
    if as_json:
        print_json(asdict(found) | ({"cluster": asdict(elsewhere)} if elsewhere else {}))
    else:
        _show(found, job, elsewhere)


def _plan(config: Config, *, full: bool) -> tuple[Plan, Job]:
    job = plan_job(config, on_gpu=on_gpu())

    def calibrate(texts: Sequence[str]) -> float:
        return measure_rate(job.spec, texts)

    return make_plan(job, calibrate, full=full), job


def _show(found: Plan, job: Job, elsewhere: WhatIf | None) -> None:
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
        "memory": f"merge about {_mb(found.merge_memory_bytes)}, search {_mb(found.index_bytes)} and mapped files",
        **(_cluster_rows(elsewhere) if elsewhere else {}),
    }
    table = Table(show_header=False, box=None)
    for name, text in rows.items():
        if name == "ignored" and not found.ignored:
            continue
        table.add_row(f"[bold]{name}", escape(text))
    results.print(table)


def _cluster_rows(found: WhatIf) -> dict[str, str]:
    """What is not measured says so."""
    unit, size = next((unit, size) for unit, size in UNITS if found.encode_s[1] >= size or unit == "seconds")
    low, high = (f"{seconds / size:.2g}" for seconds in found.encode_s)
    cluster = ", ".join(f"{count}x{name}" for name, count in found.encoders.items())
    rate = "{:,.0f} to {:,.0f} tokens/s".format(*found.tokens_per_s)
    cores = ", ".join(f"{some:g} to {many:g} cores for each {name}" for name, (some, many) in found.tokenizer_cores.items())
    return {
        "cluster": f"estimate for {cluster}: {low} to {high} {unit} of encoding, {rate}; {found.estimated_from}",
        "tokenizing": f"estimate: {cores}; {found.tokenizer_rate_source}",
    }


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"
