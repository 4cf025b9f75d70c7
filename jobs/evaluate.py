"""``vecmill evaluate``: retrieval quality by human judgements."""

from typing import Annotated

import typer
from rich.table import Table

from jobs.options import ConfigOption, JsonOption, SetOption, VerboseOption, command, print_json, results
from pipeline.config_file import load_config
from pipeline.errors import ConfigError
from pipeline.live import open_live


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
    """Measure nDCG@10, MRR@10 and recall@100 of the live artifact, for the index and for exact search."""
    from pipeline.evaluation import encode_queries, labelled, read_qrels

    settings = load_config(config, tuple(overrides or ()))
    queries, qrels = queries or settings.evaluation.queries, qrels or settings.evaluation.qrels
    if queries is None or qrels is None:
        raise ConfigError("evaluate: give --queries and --qrels, or set evaluation.queries and evaluation.qrels")
    opened = open_live(settings)
    judged = read_qrels(qrels, settings.store)
    vectors = encode_queries(opened.spec, queries, settings.store, only=judged.keys())
    metrics = labelled(opened.searcher, vectors, judged)
    if as_json:
        print_json(metrics)
        return
    table = Table("", *metrics["exact"], box=None)
    for kind, values in metrics.items():
        table.add_row(kind, *(f"{value:.4f}" for value in values.values()))
    results.print(table)
