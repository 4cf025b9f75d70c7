"""``vecmill search``: ask the live artifact, or any artifact folder."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from jobs.options import JsonOption, SetOption, VerboseOption, command, one_of, print_json, results
from pipeline.client import Artifact, open_artifact, open_root
from pipeline.config_file import load_config
from pipeline.errors import ConfigError
from pipeline.search.searcher import Hit, Mode

MIN_TEXT_CHARS = 20
ID_CHARS = 48
SOURCE_CHARS = 40
NOTHING_NAMED = "give -c FILE for the live artifact, or --artifact URI"

OptionalConfig = Annotated[str | None, typer.Option("--config", "-c", help="Config file, YAML")]
ArtifactOption = Annotated[str | None, typer.Option("--artifact", help="URI of an artifact folder, instead of the live one")]


@command
def search(
    query: Annotated[str, typer.Argument(help="The text to search for")],
    config: OptionalConfig = None,
    overrides: SetOption = None,
    artifact: ArtifactOption = None,
    k: Annotated[int | None, typer.Option("-k", min=1, max=10_000, help="Documents to show; default search.k")] = None,
    recall: Annotated[
        float | None, typer.Option("--recall", min=0, max=1, help="The fastest measured settings that find so much")
    ] = None,
    latency: Annotated[
        str | None, typer.Option("--latency", help="The best measured settings within a time per query: 2ms")
    ] = None,
    mode: Annotated[
        str | None, typer.Option("--mode", help="dense (vectors), lexical (BM25) or hybrid; default search.mode")
    ] = None,
    only: Annotated[
        str | None, typer.Option("--filter", help='Documents by metadata: {"type": "eq", "key": "kind", "value": "class"}')
    ] = None,
    rerank: Annotated[bool, typer.Option("--rerank", help="Order the best texts by the model of search.reranker")] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Search the live artifact: rank, score, document, text head, source."""
    ranked = one_of("--mode", mode, Mode)
    asked = open_named(config, overrides, artifact)
    how = {"mode": ranked, "filter": only, "recall": recall, "latency_ms": _milliseconds(latency), "rerank": rerank}
    hits = asked.search(query, k, **how)
    if as_json:
        print_json({"query": query, "artifact": asked.version, "hits": [asdict(hit) for hit in hits]})
    else:
        results.print(hit_table(hits))


def open_named(config: str | None, overrides: list[str] | None, artifact: str | None) -> Artifact:
    """The artifact that the options name: ``--artifact``, else the live one of the config."""
    settings = load_config(config, tuple(overrides or ())) if config else None
    if artifact is not None:
        return open_artifact(artifact, settings)
    if settings is None:
        raise ConfigError(NOTHING_NAMED)
    return open_root(settings)


def hit_table(hits: list[Hit]) -> Table:
    """Hits as people read them, one line each: the text is cut to what the terminal leaves for it."""
    rows = [
        (
            str(hit.rank),
            f"{hit.score:.3f}",
            _plain(hit.doc_id)[:ID_CHARS],
            _plain(f"{hit.source_uri.rpartition('/')[2]}:{hit.source_row}")[-SOURCE_CHARS:],
        )
        for hit in hits
    ]
    names = ("rank", "score", "document", "source")
    taken = sum(max([len(name), *(len(row[number]) for row in rows)]) for number, name in enumerate(names))
    room = max(MIN_TEXT_CHARS, results.width - taken - 2 * (len(names) + 1))
    table = Table("rank", "score", "document", "text", "source", box=None)
    for hit, (rank, score, document, source) in zip(hits, rows, strict=True):
        head = _plain(" ".join(hit.text[: 2 * room].split()))[:room]
        table.add_row(rank, score, Text(document), Text(head), Text(source))
    return table


def _milliseconds(text: str | None) -> float | None:
    """A time as people write it, 2ms, 0.5s or a number of milliseconds; raises ConfigError."""
    if text is None:
        return None
    number, factor = (text[:-2], 1.0) if text.endswith("ms") else (text[:-1], 1000.0) if text.endswith("s") else (text, 1.0)
    try:
        return factor * float(number)
    except ValueError as error:
        raise ConfigError(f"--latency {text}: expected a time such as 2ms") from error


def _plain(text: str) -> str:
    """Corpus text for a terminal: control characters escaped."""
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)
