"""Training pairs: a query, a text that answers it, texts that do not; one Parquet file, with the source of each row.

From judgements (``mining.judged_pairs``), from a corpus that nobody has judged (title -> body, first sentence -> rest), or from
a file of the user's own, such as generated queries.
"""

import io
import json
import math
import random
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import Config
from pipeline.errors import BadFileError, ConfigError
from pipeline.ingest.corpus import SourceDocument, normalise, read_documents
from pipeline.ingest.slices import Columns, Slice
from pipeline.ingest.units import find_files
from pipeline.root.shards import parquet_bytes
from pipeline.root.storage import file_at

Unlabelled = Literal["title", "sentence"]

SCHEMA = pa.schema(
    [
        pa.field("query", pa.string(), nullable=False),
        pa.field("positive", pa.string(), nullable=False),
        pa.field("negatives", pa.list_(pa.string())),
        pa.field("scores", pa.list_(pa.float32())),
        pa.field("query_id", pa.string()),
        pa.field("doc_id", pa.string()),
        pa.field("source", pa.string()),
    ]
)
NEEDED = ("query", "positive")
SENTENCE = re.compile(r"(.+?[.!?])\s+(\S.*)", re.DOTALL)
MIN_CHARS = 16
"""A shorter side says too little to be a query or an answer."""


@dataclass(frozen=True)
class Pair:
    """``scores``: a teacher's, of the positive and of each negative. ``doc_id``: of the positive. ``source``: of the pair."""

    query: str
    positive: str
    negatives: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    query_id: str | None = None
    doc_id: str | None = None
    source: str | None = None


def write_pairs(uri: str, pairs: Sequence[Pair], config: Config) -> None:
    """One Parquet file at any URI."""
    table = pa.Table.from_pylist([asdict(pair) for pair in pairs], schema=SCHEMA)
    storage, name = file_at(uri, config.store)
    storage.put(name, parquet_bytes(table, compress=True))


def read_pairs(uri: str, config: Config) -> list[Pair]:
    """The rows of a Parquet file with at least ``query`` and ``positive``. Raises ConfigError naming what is wrong with it."""
    storage, name = file_at(uri, config.store)
    try:
        table = pq.read_table(io.BytesIO(storage.read(name)))
    except FileNotFoundError as error:
        raise ConfigError(f"{uri}: no such file; vecmill mine makes one") from error
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{uri}: no Parquet file, {error}; give pairs as Parquet") from error
    missing = [column for column in NEEDED if column not in table.column_names]
    if missing:
        raise ConfigError(f"{uri}: no column {missing[0]}, found {', '.join(table.column_names)}; expected query and positive")
    known = [field for field in SCHEMA if field.name in table.column_names]
    try:
        rows = table.select([field.name for field in known]).cast(pa.schema([field.with_nullable(True) for field in known]))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise ConfigError(f"{uri}: other types than those of training pairs, {error}; expected {SCHEMA}") from error
    pairs = [_pair(uri, number, row) for number, row in enumerate(rows.to_pylist())]
    if not pairs:
        raise ConfigError(f"{uri}: no pairs; give at least one")
    return pairs


def _pair(uri: str, number: int, row: dict[str, Any]) -> Pair:
    for column in NEEDED:
        if not (row[column] or "").strip():
            raise ConfigError(f"{uri}: row {number} has no {column}; mend or drop the row")
    lists: dict[str, Any] = {name: tuple(row.pop(name, None) or ()) for name in ("negatives", "scores")}
    pair = Pair(**row, **lists)
    if not all((text or "").strip() for text in pair.negatives):
        raise ConfigError(f"{uri}: row {number} has an empty negative; mend or drop the row")
    if not all(score is not None and math.isfinite(score) for score in pair.scores):
        raise ConfigError(f"{uri}: row {number} has a score that is no number; mend or drop the row")
    if pair.scores and len(pair.scores) != len(pair.negatives) + 1:
        found = f"{len(pair.scores)} scores for a positive and {len(pair.negatives)} negatives"
        raise ConfigError(f"{uri}: row {number} has {found}; mend or drop the row")
    return pair


def corpus_pairs(config: Config, kind: Unlabelled, limit: int, live: Collection[str], seed: int) -> list[Pair]:
    """Pairs out of the corpus itself, a uniform sample of at most ``limit``: title -> text, or first sentence -> rest.

    ``live``: ids of the documents that count. Raises ConfigError where the corpus gives no pair.
    """
    cut = _title_and_body if kind == "title" else _sentence_and_rest
    source, rng = f"{kind} of {config.corpus.uri}", random.Random(seed)  # noqa: S311 - a sample, no secret
    pairs: list[Pair] = []
    seen = 0
    for document, title in _documents(config):
        found = cut(document.text, title) if document.doc_id in live else None
        if found is None or min(map(len, found)) < MIN_CHARS:
            continue
        seen += 1
        place = len(pairs) if len(pairs) < limit else rng.randrange(seen)  # reservoir sampling
        if place < limit:
            pairs[place : place + 1] = [Pair(*found, query_id=document.doc_id, doc_id=document.doc_id, source=source)]
    if not pairs:
        raise ConfigError(f"{config.corpus.uri}: no pair from a {kind}; set corpus.title, or give judgements")
    return pairs


def _documents(config: Config) -> Iterator[tuple[SourceDocument, str]]:
    """Every document with its title, which its text begins with; an empty one where it has none."""
    for file, kind in find_files(config)[0]:
        part = Slice(uri=file.uri, size_bytes=file.size_bytes, stamp=file.stamp, content="", format=kind)
        title = Columns.of(kind, config.corpus).title
        corpus = config.corpus.model_copy(update={"metadata": (title,) if title else ()})
        try:
            for row in read_documents(part, corpus, config.store):
                if isinstance(row, SourceDocument):
                    yield row, normalise(str(json.loads(row.metadata)[title] or "")) if title and row.metadata else ""
        except BadFileError:
            if config.corpus.on_error != "skip_file":
                raise


def _title_and_body(text: str, title: str) -> tuple[str, str] | None:
    return (title, text.removeprefix(title).strip()) if title else None


def _sentence_and_rest(text: str, title: str) -> tuple[str, str] | None:
    found = SENTENCE.fullmatch(text.removeprefix(title).strip())
    return (found[1], found[2]) if found else None
