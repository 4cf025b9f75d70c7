"""``vecmill compare``: artifacts against each other on the same judged queries."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from jobs.options import JsonOption, SetOption, VerboseOption, command, one_of, print_json, results, write_file
from pipeline.search.searcher import Mode

if TYPE_CHECKING:
    from pipeline.reports.comparison import Comparison

LIKELY_CHANCE = 0.05


@command
def compare(
    targets: Annotated[
        list[str], typer.Argument(help="Config files (their live artifacts) or artifact URIs; the first is the baseline")
    ],
    queries: Annotated[str, typer.Option("--queries", help="JSONL of queries (_id, text)")],
    qrels: Annotated[str, typer.Option("--qrels", help="TSV of judgements (query-id, corpus-id, score)")],
    mode: Annotated[
        str | None, typer.Option("--mode", help="dense, lexical or hybrid, for all; default: each config's search.mode")
    ] = None,
    rerank: Annotated[bool, typer.Option("--rerank", help="Re-rank those whose config names a search.reranker")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with plots to this file")] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure nDCG@10, MRR@10, recall@100, time and bytes of each, and how sure the differences to the first are."""
    from pipeline.reports.comparison import compare as compare_artifacts

    ranked = one_of("--mode", mode, Mode)
    found = compare_artifacts(targets, queries, qrels, mode=ranked, rerank=rerank, overrides=tuple(overrides or ()))
    if as_json:
        print_json(found.model_dump())
    else:
        _show(found)
    if html is not None:
        from pipeline.reports.report import render_comparison

        write_file(html, render_comparison(found))


def _show(found: "Comparison") -> None:
    table = Table("", *found.artifacts[0].metrics, "ms", "bytes/vector", "dim", box=None)
    for each in found.artifacts:
        metrics = [f"{value:.4f}" for value in each.metrics.values()]
        table.add_row(escape(each.name), *metrics, f"{each.p50_ms:.1f}", f"{each.bytes_per_vector:.1f}", str(each.dim))
    results.print(table)
    for change in found.differences:
        sure = "" if change.p < LIKELY_CHANCE else ", may be chance"
        counts = f"better for {change.wins}, worse for {change.losses} of {found.queries} queries"
        results.print(f"{change.name}: {change.metric} {change.mean:+.4f}, p {change.p:.4f}{sure}; {counts}", markup=False)
