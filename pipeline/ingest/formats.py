"""Input files -> raw rows, one reader per format, each row with its number in the file.

Our own readers, because the stack's readers cast, fill and skip without a word (pyarrow fills a missing text
column with nulls, Ray drops 0-byte Parquet files). A broken file raises BadFileError naming it; a broken row is
handed on as such. Row numbers count from 0 and leave out a CSV header.
"""

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

import pyarrow as pa

from pipeline.config import StoreConfig
from pipeline.errors import BadFileError
from pipeline.ingest import parquet_input
from pipeline.ingest.slices import (
    COMPRESSION_ENDINGS,
    BadRowError,
    Columns,
    Row,
    Rows,
    Slice,
    check_expansion,
    opened,
    require,
)
from pipeline.root.shards import is_storages
from pipeline.root.storage import Storage

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAX_LINE_BYTES = 64 << 20


def read_rows(part: Slice, columns: Columns, store: StoreConfig) -> Rows:
    """Every row of a slice with its number, as a mapping of the wanted columns or as the error that made it unreadable."""
    return _READERS[part.format](part, columns, store)


def count_rows(part: Slice, store: StoreConfig) -> int:
    """Rows of a slice without looking into them: Parquet's own number, the non-blank lines, the records of a CSV file."""
    if part.format == "parquet":
        return parquet_input.count_rows(part, store)
    if part.format == "text":
        return 1
    with opened(part, store) as handle:
        if part.format in {"csv", "tsv"}:
            return max(0, sum(1 for row in _delimited(handle, part) if row) - 1)
        return sum(1 for line in _lines(handle, part) if line.strip())


def _read_jsonl(part: Slice, columns: Columns, store: StoreConfig) -> Rows:
    with opened(part, store) as handle:
        for number, line in enumerate(_lines(handle, part)):
            content = (line.removeprefix(BYTE_ORDER_MARK) if number == 0 else line).strip()
            if content:
                yield number, _too_long(line) or _json_row(content, is_cut=not line.endswith(b"\n"))


def _too_long(line: bytes) -> BadRowError | None:
    return BadRowError("E_LINE_TOO_LONG", f"a line of over {MAX_LINE_BYTES} bytes") if len(line) > MAX_LINE_BYTES else None


def _json_row(line: bytes, *, is_cut: bool) -> Row:
    try:
        row = json.loads(line, object_pairs_hook=_object, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        return BadRowError("E_UTF8", f"the line is not UTF-8 at byte {error.start}")
    except BadRowError as error:
        return error
    except (ValueError, RecursionError) as error:
        hint = " (the last line, without a line end: was the file cut?)" if is_cut else ""
        return BadRowError("E_JSON", f"the line is not JSON: {error}{hint}")
    return row if isinstance(row, dict) else BadRowError("E_JSON", f"the line is a {type(row).__name__}, expected an object")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise BadRowError("E_DUP_KEY", f"key {twice[:80]!r} is there twice; which one is meant?")
    return found


def _no_number(name: str) -> Any:
    raise BadRowError("E_TYPE", f"{name} is no JSON value; write null or leave the row out")


def _read_delimited(part: Slice, columns: Columns, store: StoreConfig) -> Rows:
    with opened(part, store) as handle:
        rows = _delimited(handle, part)
        header = next(rows, [])
        require(columns, header, part.uri)
        for number, row in enumerate(rows):
            if len(row) == len(header):
                yield number, dict(zip(header, row, strict=True))
            elif row:
                yield number, BadRowError("E_COLUMNS", f"{len(row)} fields, the header has {len(header)}")


def _delimited(handle: BinaryIO, part: Slice) -> Iterator[list[str]]:
    csv.field_size_limit(MAX_LINE_BYTES)
    lines = _decoded(handle, part)
    # a TSV has no quoting: a field that begins with a quote would swallow the rows after it
    rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if part.format == "tsv" else csv.reader(lines, strict=True)
    try:
        yield from rows
    except csv.Error as error:
        raise BadFileError(f"{part.uri}: E_CSV, at line {rows.line_num}, {error}; mend the quoting") from error


def _decoded(handle: BinaryIO, part: Slice) -> Iterator[str]:
    for number, line in enumerate(_lines(handle, part)):
        if error := _too_long(line):
            raise BadFileError(f"{part.uri}: {error.code}, line {number + 1} has over {MAX_LINE_BYTES} bytes; mend the quoting")
        yield (line.removeprefix(BYTE_ORDER_MARK) if number == 0 else line).decode("utf-8", "surrogateescape")


def _read_text(part: Slice, columns: Columns, store: StoreConfig) -> Rows:
    with opened(part, store) as handle:
        below = Storage(columns.base, store).uri.rstrip("/") + "/"
        name = part.uri.removeprefix(below) if part.uri.startswith(below) else part.uri.rpartition("/")[2]
        lines = list(_lines(handle, part))
        yield 0, _too_long(max(lines, key=len, default=b"")) or {columns.id: name, columns.text: b"".join(lines)}


_READERS: dict[str, Callable[[Slice, Columns, StoreConfig], Rows]] = {
    "parquet": parquet_input.read_parquet,
    "jsonl": _read_jsonl,
    "beir": _read_jsonl,
    "csv": _read_delimited,
    "tsv": _read_delimited,
    "text": _read_text,
}


def _lines(handle: BinaryIO, part: Slice) -> Iterator[bytes]:
    """Lines of a file, decompressed; of a line longer than MAX_LINE_BYTES one byte more than that."""
    size = 0
    try:
        with io.BufferedReader(cast(io.RawIOBase, _decompressed(handle, part.uri)), 1 << 20) as lines:
            while line := lines.readline(MAX_LINE_BYTES + 1):
                size += len(line)
                rest = line
                while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
                    rest = lines.readline(MAX_LINE_BYTES + 1)
                    size += len(rest)
                    check_expansion(part, size)
                check_expansion(part, size)
                yield line
    except (EOFError, gzip.BadGzipFile, zlib.error, pa.ArrowInvalid) as error:
        raise BadFileError(f"{part.uri}: E_COMPRESSION, {error}; compress the file again") from error
    except OSError as error:
        if is_storages(error) or not part.uri.endswith(COMPRESSION_ENDINGS):
            raise
        raise BadFileError(f"{part.uri}: E_COMPRESSION, {error}; compress the file again") from error


def _decompressed(handle: BinaryIO, uri: str) -> BinaryIO:
    if uri.endswith(".gz"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=handle, mode="rb"))
    if uri.endswith(".zst"):
        return cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(handle, mode="r"), "zstd"))
    return handle
