"""``vecmill evaluate``: retrieval quality by human judgements."""

from typing import Annotated

import typer
from rich.table import Table

from jobs.options import ConfigOption, JsonOption, SetOption, VerboseOption, command, print_json, results
from pipeline.artifacts.live import open_live
from pipeline.config_file import load_config
from pipeline.errors import ConfigError


@command
def evaluate(
    config: ConfigOption,
    queries: Annotated[
        str | None, typer.Option("--queries", help="JSONL of queries (_id, text); default evaluation.queries")
    ] = None,
    qrels: Annotated[str | None, typer.Option("--qrels", help="TSV of judgements; default evaluation.qrels")] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure nDCG@10, MRR@10 and recall@100 of the live artifact, for every way it can be searched."""
    from pipeline.search.evaluation import labelled

    settings = load_config(config, tuple(overrides or ()))
    queries, qrels = queries or settings.evaluation.queries, qrels or settings.evaluation.qrels
    if queries is None or qrels is None:
        raise ConfigError("evaluate: give --queries and --qrels, or set evaluation.queries and evaluation.qrels")
    opened = open_live(settings)
    metrics = labelled(opened.searcher, opened.spec, queries, qrels, settings.store)
    if as_json:
        print_json(metrics)
        return
    table = Table("", *metrics["exact"], box=None)
    for kind, values in metrics.items():
        table.add_row(kind, *(f"{value:.4f}" for value in values.values()))
    results.print(table)
