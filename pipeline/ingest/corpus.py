"""The corpus contract: which files count, and rows -> documents that keep it or rejected rows that say why not.

A bad file stops the run, naming the file; a bad row is rejected with its file, row and code, never dropped.
"""

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config import StoreConfig
from pipeline.config_what import CorpusConfig
from pipeline.errors import BadFileError, ConfigError, DataError
from pipeline.fingerprint import sha256
from pipeline.ingest.formats import read_rows
from pipeline.ingest.listing import FileInfo
from pipeline.ingest.slices import BadRowError, Columns, Slice, base_name, ending
from pipeline.root.manifest import InputFile

FORMAT_OF_ENDING = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
}
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
SURROGATES = re.compile(r"[\ud800-\udfff]")
INVISIBLE = {"Cc", "Cf", "Mn", "Zs", "Zl", "Zp"}
TEXT_HEAD_CHARS = 200
MAX_ID_CHARS = 2048


@dataclass(frozen=True)
class SourceDocument:
    """A row that keeps the contract. ``text`` is joined and normalised, ``metadata`` is JSON or None."""

    doc_id: str
    text: str
    metadata: str | None
    source_uri: str
    source_row: int


@dataclass(frozen=True)
class RejectedRow:
    """A row that does not keep the contract, or a whole file (no row), and why."""

    source_uri: str
    source_row: int | None
    doc_id: str | None
    code: str
    message: str
    text_sha256: str | None
    text_head: str | None


def choose_files(files: Sequence[FileInfo], corpus: CorpusConfig) -> list[tuple[FileInfo, str]]:
    """The corpus files among the listed ones, each with its format.

    Raises ConfigError when no file has a known ending, DataError on an empty file or on mixed formats.
    """
    if corpus.format == "beir" or (corpus.format == "auto" and _looks_like_beir(files)):
        chosen = [(file, "beir") for file in files if base_name(file.uri) == "corpus.jsonl"]
        if not chosen:
            raise ConfigError(f"{corpus.uri}: no corpus.jsonl[.gz|.zst] in this BEIR folder; check corpus.uri")
    elif corpus.format != "auto":
        chosen = [(file, corpus.format) for file in files]
    else:
        chosen = [(file, FORMAT_OF_ENDING[found]) for file in files if (found := ending(file.uri)) in FORMAT_OF_ENDING]
        if not chosen:
            raise ConfigError(f"{corpus.uri}: no file ends in {', '.join(FORMAT_OF_ENDING)} [.gz|.zst]; set corpus.format")
        formats = sorted({found for _, found in chosen})
        if len(formats) > 1:
            raise DataError(
                f"{corpus.uri}: files of several formats, {', '.join(formats)}; set corpus.format or narrow corpus.uri"
            )
    for file, found in chosen:
        if file.size_bytes == 0 and found != "text":
            raise BadFileError(f"{file.uri}: E_EMPTY_FILE, 0 bytes; remove the file or export it again")
    return chosen


def read_documents(part: Slice, corpus: CorpusConfig, store: StoreConfig) -> Iterator[SourceDocument | RejectedRow]:
    """Every row of a slice, in order, as a document or as a rejected row. Raises DataError on a broken file."""
    columns = Columns.of(part.format, corpus)
    for number, row in read_rows(part, columns, store):
        yield _document(row, number, part, columns)


def _document(row: dict[str, Any] | BadRowError, number: int, part: Slice, columns: Columns) -> SourceDocument | RejectedRow:
    doc_id: str | None = None
    raw_text: Any = None
    try:
        if isinstance(row, BadRowError):
            raise row
        raw_text = row.get(columns.text)
        doc_id = _doc_id(row.get(columns.id), columns.id)
        title = _text(row[columns.title], columns.title) if columns.title and row.get(columns.title) else ""
        text = normalise(f"{title} {_text(raw_text, columns.text)}")
        if all(unicodedata.category(char) in INVISIBLE for char in text):
            raise BadRowError("E_EMPTY_TEXT", f"column {columns.text!r} has no visible character")
        metadata = {name: row.get(name) for name in columns.metadata}
        packed = _packed(metadata) if metadata else None
    except BadRowError as error:
        seen = raw_text.encode("utf-8", "surrogatepass") if isinstance(raw_text, str) else raw_text
        digest, head = (sha256(seen), text_head(seen)) if isinstance(seen, bytes) else (None, None)
        return RejectedRow(part.uri, number, doc_id, error.code, str(error), digest, head)
    return SourceDocument(doc_id, text, packed, part.uri, number)


def rejected_document(document: SourceDocument, code: str, message: str) -> RejectedRow:
    """A document that kept the contract and is put aside all the same."""
    text = document.text.encode()
    where = (document.source_uri, document.source_row, document.doc_id)
    return RejectedRow(*where, code, message, sha256(text), text_head(text))


def read_ids(files: Sequence[tuple[InputFile, str]], corpus: CorpusConfig, store: StoreConfig) -> Iterator[str]:
    """The document id of every row of ``corpus.deletes``; raises DataError on a row without: nothing may stay by accident."""
    for file, kind in files:
        part = Slice(uri=file.uri, size_bytes=file.size_bytes, stamp=file.stamp, content=file.content, format=kind)
        columns = replace(Columns.of(kind, corpus), title=None, metadata=())
        columns = replace(columns, text=columns.id)
        for number, row in read_rows(part, columns, store):
            try:
                if isinstance(row, BadRowError):
                    raise row
                yield _doc_id(row.get(columns.id), columns.id)
            except BadRowError as error:
                raise DataError(f"{file.uri} row {number}: {error.code}, {error}; mend corpus.deletes") from error


def normalise(text: str) -> str:
    """NFC, control characters removed (tab and line ends stay), surrounding white space stripped."""
    return unicodedata.normalize("NFC", CONTROL_CHARACTERS.sub("", text)).strip()


def _doc_id(value: Any, column: str) -> str:
    if value is None or value in ("", b""):
        raise BadRowError("E_NULL_ID", f"column {column!r} is empty; every row needs an id")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    found = _text(value, column)
    if len(found) > MAX_ID_CHARS:
        raise BadRowError("E_ID_TOO_LONG", f"column {column!r} has {len(found)} characters, at most {MAX_ID_CHARS} make an id")
    return found


def _text(value: Any, column: str) -> str:
    if value is None:
        raise BadRowError("E_NULL_TEXT", f"column {column!r} is null or missing")
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRowError("E_UTF8", f"column {column!r} is not UTF-8 at byte {error.start}") from error
    if not isinstance(value, str):
        raise BadRowError("E_TYPE", f"column {column!r} is a {type(value).__name__}, expected a string")
    if SURROGATES.search(value):
        raise BadRowError("E_UTF8", f"column {column!r} has a lone surrogate")
    return value


def _packed(metadata: dict[str, Any]) -> str:
    try:
        packed = json.dumps(metadata, ensure_ascii=False, default=_plain, allow_nan=False)
        packed.encode()
    except UnicodeEncodeError as error:
        raise BadRowError("E_UTF8", f"metadata is not UTF-8 at character {error.start}") from error
    except ValueError as error:
        raise BadRowError("E_TYPE", "metadata holds NaN or Infinity, which JSON has no form for") from error
    return packed


def _plain(value: Any) -> str:
    """What JSON has no form for; a column of strings may come as bytes."""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def text_head(data: bytes) -> str:
    """The beginning of a text, escaped so that no terminal and no log acts on it."""
    text = data[: 4 * TEXT_HEAD_CHARS].decode("utf-8", "backslashreplace")[:TEXT_HEAD_CHARS]
    return text.encode("unicode_escape").decode()


def _looks_like_beir(files: Sequence[FileInfo]) -> bool:
    names = {base_name(file.uri) for file in files}
    return "corpus.jsonl" in names and "queries.jsonl" in names
