"""Input files -> raw rows, one reader per format, each row with its number in the file.

Our own readers, because the stack's readers cast, fill and skip without a word (pyarrow fills a missing text
column with nulls, Ray drops 0-byte Parquet files). A broken file raises DataError naming it; a broken row is
handed on as such. Row numbers count from 0 and leave out a CSV header.
"""

import csv
import difflib
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from pipeline.config import CorpusConfig, StoreConfig
from pipeline.errors import DataError
from pipeline.storage import Storage

COMPRESSION_ENDINGS = (".gz", ".zst")
BATCH_ROWS = 1024
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Slice(BaseModel):
    """A file, or a run of row groups of a Parquet file (``first`` included, ``end`` not). ``content`` identifies its bytes."""

    model_config = ConfigDict(frozen=True)
    uri: str
    size_bytes: int
    content: str
    format: str
    first_row_group: int = 0
    end_row_group: int | None = None


class BadRowError(Exception):
    """A row that cannot be read or used: ``code`` for machines, the text for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Columns:
    """Names of the columns that matter; ``base``: the URI that text files are named relative to."""

    id: str
    text: str
    title: str | None
    metadata: tuple[str, ...]
    base: str

    @staticmethod
    def of(file_format: str, corpus: CorpusConfig) -> "Columns":
        """What the config says, else the format's own names."""
        beir = file_format == "beir"
        title = corpus.title if corpus.title or not beir else "title"
        base = re.split(r"[*\[]", corpus.uri, maxsplit=1)[0].rpartition("/")[0] if set("*[") & set(corpus.uri) else corpus.uri
        return Columns(corpus.id or ("_id" if beir else "id"), corpus.text or "text", title, corpus.metadata, base)

    @property
    def names(self) -> list[str]:
        """Each wanted column once."""
        return list(dict.fromkeys([self.id, self.text, *([self.title] if self.title else []), *self.metadata]))


_Row = dict[str, Any] | BadRowError
_Rows = Iterator[tuple[int, _Row]]


def row_group_bytes(uri: str, store: StoreConfig) -> list[int]:
    """Compressed size of each row group of a Parquet file."""
    with _open(uri, store) as handle:
        metadata = _parquet(handle, uri).metadata
        return [
            sum(metadata.row_group(group).column(column).total_compressed_size for column in range(metadata.num_columns))
            for group in range(metadata.num_row_groups)
        ]


def read_rows(part: Slice, columns: Columns, store: StoreConfig) -> _Rows:
    """Every row of a slice with its number, as a mapping of the wanted columns or as the error that made it unreadable."""
    return _READERS[part.format](part, columns, store)


def count_rows(part: Slice, store: StoreConfig) -> int:
    """Rows of a slice without looking into them: Parquet's own number, the non-blank lines, the records of a CSV file."""
    with _open(part.uri, store) as handle:
        if part.format == "parquet":
            metadata = _parquet(handle, part.uri).metadata
            end = metadata.num_row_groups if part.end_row_group is None else part.end_row_group
            return sum(metadata.row_group(group).num_rows for group in range(part.first_row_group, end))
        if part.format == "text":
            return 1
        if part.format in {"csv", "tsv"}:
            return max(0, sum(1 for row in _delimited(handle, part) if row) - 1)
        return sum(1 for line in _guarded(_lines(_decompressed(handle, part.uri)), part.uri) if line.strip())


def base_name(uri: str) -> str:
    """File name without its compression ending."""
    name = uri.rpartition("/")[2]
    for ending in COMPRESSION_ENDINGS:
        name = name.removesuffix(ending)
    return name


def ending(uri: str) -> str:
    """Lower-case ending of the file name, compression aside; empty if it has none."""
    name = base_name(uri)
    return name[name.rfind(".") :].lower() if "." in name else ""


def _read_parquet(part: Slice, columns: Columns, store: StoreConfig) -> _Rows:
    with _open(part.uri, store) as handle:
        file = _parquet(handle, part.uri)
        schema = file.schema_arrow
        _require(columns, schema.names, part.uri)
        end = file.num_row_groups if part.end_row_group is None else part.end_row_group
        number = sum(file.metadata.row_group(group).num_rows for group in range(part.first_row_group))
        groups = list(range(part.first_row_group, end))
        try:
            for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=columns.names):
                names = batch.schema.names
                values = [_python_values(batch.column(index)) for index in range(batch.num_columns)]
                for row in zip(*values, strict=True):
                    yield number, dict(zip(names, row, strict=True))
                    number += 1
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            raise DataError(f"{part.uri}: E_PARQUET_CORRUPT after row {number}, {error}; write the file again") from error


def _python_values(column: Any) -> list[Any]:
    """Python values; strings come as bytes where one of them is not UTF-8, so that the row is found, not the file lost."""
    try:
        return cast(list[Any], column.to_pylist())
    except UnicodeDecodeError:
        return cast(list[Any], column.cast(pa.large_binary()).to_pylist())


def _parquet(handle: BinaryIO, uri: str) -> Any:
    try:
        return pq.ParquetFile(handle, page_checksum_verification=True)
    except (pa.ArrowInvalid, OSError) as error:
        handle.seek(0)
        head = handle.read(4)
        code = "E_PARQUET_TRUNCATED" if head == b"PAR1" else f"E_NOT_PARQUET, starts with {head!r}"
        raise DataError(f"{uri}: {code}, {' '.join(str(error).split())}; write the file again or remove it") from error


def _read_jsonl(part: Slice, columns: Columns, store: StoreConfig) -> _Rows:
    with _open(part.uri, store) as handle, _lines(_decompressed(handle, part.uri)) as lines:
        for number, line in enumerate(_guarded(lines, part.uri)):
            if content := (line.removeprefix(BYTE_ORDER_MARK) if number == 0 else line).strip():
                yield number, _json_row(content)


def _json_row(line: bytes) -> _Row:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        return BadRowError("E_UTF8", f"the line is not UTF-8 at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return BadRowError("E_JSON", f"the line is not JSON: {error}")
    return row if isinstance(row, dict) else BadRowError("E_JSON", f"the line is a {type(row).__name__}, expected an object")


def _read_delimited(part: Slice, columns: Columns, store: StoreConfig) -> _Rows:
    with _open(part.uri, store) as handle:
        rows = _delimited(handle, part)
        header = next(rows, [])
        _require(columns, header, part.uri)
        for number, row in enumerate(rows):
            if len(row) == len(header):
                yield number, dict(zip(header, row, strict=True))
            elif row:
                yield number, BadRowError("E_COLUMNS", f"{len(row)} fields, the header has {len(header)}")


def _delimited(handle: BinaryIO, part: Slice) -> Iterator[list[str]]:
    csv.field_size_limit(sys.maxsize)
    stream = io.TextIOWrapper(_decompressed(handle, part.uri), "utf-8-sig", errors="surrogateescape", newline="")
    lines = _guarded(stream, part.uri)
    # a TSV has no quoting: a field that begins with a quote would swallow the rows after it
    rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if part.format == "tsv" else csv.reader(lines, strict=True)
    try:
        yield from rows
    except csv.Error as error:
        raise DataError(f"{part.uri}: E_CSV at line {rows.line_num}, {error}; mend the quoting") from error


def _read_text(part: Slice, columns: Columns, store: StoreConfig) -> _Rows:
    with _open(part.uri, store) as handle:
        below = Storage(columns.base, store).uri.rstrip("/") + "/"
        name = part.uri.removeprefix(below) if part.uri.startswith(below) else part.uri.rpartition("/")[2]
        (content,) = _guarded((stream.read() for stream in [_decompressed(handle, part.uri)]), part.uri)
        yield 0, {columns.id: name, columns.text: content}


_READERS: dict[str, Callable[[Slice, Columns, StoreConfig], _Rows]] = {
    "parquet": _read_parquet,
    "jsonl": _read_jsonl,
    "beir": _read_jsonl,
    "csv": _read_delimited,
    "tsv": _read_delimited,
    "text": _read_text,
}


def _require(columns: Columns, found: Sequence[str], uri: str) -> None:
    for name in columns.names:
        if name not in found:
            close = difflib.get_close_matches(name, found, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "set corpus.id, corpus.text, corpus.title"
            raise DataError(f"{uri}: E_SCHEMA, wanted column {name!r}, the file has {', '.join(found)}; {hint}")


def _guarded(lines: Any, uri: str) -> Iterator[Any]:
    try:
        yield from lines
    except (EOFError, gzip.BadGzipFile, zlib.error, OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{uri}: E_COMPRESSION, {error}; compress the file again") from error


def _lines(stream: BinaryIO) -> io.BufferedReader:
    return io.BufferedReader(cast(io.RawIOBase, stream), 1 << 20)


def _decompressed(handle: BinaryIO, uri: str) -> BinaryIO:
    if uri.endswith(".gz"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=handle, mode="rb"))
    if uri.endswith(".zst"):
        return cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(handle, mode="r"), "zstd"))
    return handle


def _open(uri: str, store: StoreConfig) -> BinaryIO:
    folder, _, name = uri.rpartition("/")
    try:
        return Storage(folder or "/", store).open(name)
    except FileNotFoundError as error:
        raise DataError(f"{uri}: E_INPUT_CHANGED, the file is gone since it was listed; run again") from error
