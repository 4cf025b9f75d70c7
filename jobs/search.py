"""``vecmill search``: ask the live artifact, or any artifact folder."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from jobs.options import JsonOption, SetOption, VerboseOption, command, print_json, results
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.errors import ConfigError
from pipeline.live import Opened, open_live, open_uri, query_spec
from pipeline.operating import pick
from pipeline.searcher import Hit

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
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Search the live artifact: rank, score (cosine), document, text head, source."""
    settings, opened = open_artifact(config, overrides, artifact)
    if not query.strip():
        raise ConfigError("search: the query is empty; give a text")
    if recall is not None or latency is not None:
        points = opened.manifest.evaluation.points
        opened.searcher.point = pick(points, recall=recall, latency_ms=_milliseconds(latency))
    from pipeline.encoder import load_query_encoder

    vectors = load_query_encoder(query_spec(opened, settings)).encode_queries([query])
    hits = opened.searcher.search(vectors, k or (settings.search.k if settings else 10))[0]
    if as_json:
        print_json({"query": query, "artifact": opened.manifest.version, "hits": [asdict(hit) for hit in hits]})
    else:
        results.print(hit_table(hits))


def open_artifact(config: str | None, overrides: list[str] | None, artifact: str | None) -> tuple[Config | None, Opened]:
    """The artifact that the options name: ``--artifact``, else the live one of the config."""
    settings = load_config(config, tuple(overrides or ())) if config else None
    if artifact is not None:
        if settings is None:
            return None, open_uri(artifact)
        trusted = settings.encoder.trust_remote_code
        return settings, open_uri(artifact, settings.search, settings.store, trust_remote_code=trusted)
    if settings is None:
        raise ConfigError(NOTHING_NAMED)
    return settings, open_live(settings)


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
