"""``vecmill search``: ask the live artifact, or any artifact folder."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from jobs.options import JsonOption, SetOption, VerboseOption, command, print_json, results
from pipeline.config import Config, load_config
from pipeline.errors import ConfigError
from pipeline.live import Opened, open_live, open_uri, query_spec
from pipeline.searcher import Hit

HEAD_CHARS = 100
ID_CHARS = 48

OptionalConfig = Annotated[str | None, typer.Option("--config", "-c", help="Config file, YAML")]
ArtifactOption = Annotated[str | None, typer.Option("--artifact", help="URI of an artifact folder, instead of the live one")]


@command
def search(
    query: Annotated[str, typer.Argument(help="The text to search for")],
    config: OptionalConfig = None,
    overrides: SetOption = None,
    artifact: ArtifactOption = None,
    k: Annotated[int | None, typer.Option("-k", min=1, max=10_000, help="Documents to show; default search.k")] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Search the live artifact: rank, score (cosine), document, text head, source."""
    settings, opened = open_artifact(config, overrides, artifact)
    if not query.strip():
        raise ConfigError("search: the query is empty; give a text")
    from pipeline.encoder import load_query_encoder

    vectors = load_query_encoder(query_spec(opened, settings)).encode_queries([query])
    hits = opened.searcher.search(vectors, k or (settings.search.k if settings else 10))[0]
    if as_json:
        print_json({"query": query, "artifact": opened.manifest.version, "hits": [asdict(hit) for hit in hits]})
    else:
        results.print(hit_table(hits))


def open_artifact(config: str | None, overrides: list[str] | None, artifact: str | None) -> tuple[Config | None, Opened]:
    """The artifact that the options name: ``--artifact``, else the live one of the config."""
    if config is None and artifact is None:
        raise ConfigError("give -c FILE for the live artifact, or --artifact URI")
    settings = load_config(config, tuple(overrides or ())) if config else None
    if artifact is not None:
        return settings, open_uri(artifact, settings.search if settings else None, settings.store if settings else None)
    if settings is None:
        raise ConfigError("give -c FILE for the live artifact, or --artifact URI")
    return settings, open_live(settings)


def hit_table(hits: list[Hit]) -> Table:
    """Hits as people read them."""
    table = Table("rank", "score", box=None)
    longest = max((len(_plain(hit.doc_id)) for hit in hits), default=0)
    table.add_column("document", no_wrap=True, overflow="ellipsis", min_width=min(longest, ID_CHARS))
    for name in ("text", "source"):
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    for hit in hits:
        head = " ".join(hit.text[: 2 * HEAD_CHARS].split())[:HEAD_CHARS]
        source = f"{hit.source_uri.rpartition('/')[2]}:{hit.source_row}"
        table.add_row(str(hit.rank), f"{hit.score:.3f}", _plain(hit.doc_id), _plain(head), _plain(source))
    return table


def _plain(text: str) -> str:
    """Corpus text on a terminal: control characters escaped, no markup."""
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text).replace("[", r"\[")
