"""Parquet input: rows of the wanted columns, after the footer has been looked at.

pyarrow alone fills a missing column with nulls, casts what differs, and lets extension types run code.
"""

import base64
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import StoreConfig
from pipeline.errors import BadFileError
from pipeline.ingest.slices import Columns, Rows, Slice, check_expansion, opened, require
from pipeline.root.shards import is_storages

BATCH_ROWS = 1024
EXTENSION = b"ARROW:extension:name"


def row_group_bytes(part: Slice, store: StoreConfig) -> list[int]:
    """Compressed size of each row group of a Parquet file."""
    with opened(part, store) as handle:
        metadata = _parquet(handle, part).metadata
        return [_compressed(metadata.row_group(group)) for group in range(metadata.num_row_groups)]


def count_rows(part: Slice, store: StoreConfig) -> int:
    """Rows of a slice, by the footer."""
    with opened(part, store) as handle:
        metadata = _parquet(handle, part).metadata
        end = metadata.num_row_groups if part.end_row_group is None else part.end_row_group
        return sum(metadata.row_group(group).num_rows for group in range(part.first_row_group, end))


def read_parquet(part: Slice, columns: Columns, store: StoreConfig) -> Rows:
    """Every row of a slice with its number."""
    with opened(part, store) as handle:
        file = _parquet(handle, part)
        schema = file.schema_arrow
        require(columns, schema.names, part.uri)
        _check_types(columns, schema, part.uri)
        end = file.num_row_groups if part.end_row_group is None else part.end_row_group
        number = sum(file.metadata.row_group(group).num_rows for group in range(part.first_row_group))
        groups = list(range(part.first_row_group, end))
        size = 0
        try:
            for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=columns.names):
                size += batch.nbytes
                check_expansion(part, size)
                names = batch.schema.names
                values = [_python_values(batch.column(index)) for index in range(batch.num_columns)]
                for row in zip(*values, strict=True):
                    yield number, dict(zip(names, row, strict=True))
                    number += 1
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            if is_storages(error):
                raise
            found = f"after row {number}, {error}; write the file again"
            raise BadFileError(f"{part.uri}: E_PARQUET_CORRUPT, {found}") from error


def _python_values(column: Any) -> list[Any]:
    """Python values; strings come as bytes where one of them is not UTF-8, so that the row is found, not the file lost.

    A moment that Python has no type for comes as Arrow writes it.
    """
    try:
        return cast(list[Any], column.to_pylist())
    except UnicodeDecodeError:
        return cast(list[Any], column.cast(pa.large_binary()).to_pylist())
    except (OverflowError, ValueError):
        return [_python_value(value) for value in column]


def _python_value(value: Any) -> Any:
    try:
        return value.as_py()
    except (OverflowError, ValueError):
        return value.cast(pa.string()).as_py()


def _parquet(handle: BinaryIO, part: Slice) -> Any:
    try:
        metadata = pq.read_metadata(handle)
        for group in range(metadata.num_row_groups):
            row_group = metadata.row_group(group)
            check_expansion(part, row_group.total_byte_size, _compressed(row_group))
            _check_codecs(part, row_group)
        if EXTENSION in base64.b64decode((metadata.metadata or {}).get(b"ARROW:schema", b"")):
            found = "a column of an extension type, and reading those may run code; write plain values"
            raise BadFileError(f"{part.uri}: E_UNSUPPORTED, {found}")
        return pq.ParquetFile(handle, metadata=metadata, page_checksum_verification=True)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, ValueError) as error:
        if is_storages(error):
            raise
        handle.seek(0)
        head = handle.read(4)
        found = " ".join(str(error).split())
        if head == b"PARE" or "encrypt" in found or isinstance(error, pa.ArrowNotImplementedError):
            raise BadFileError(f"{part.uri}: E_UNSUPPORTED, {found}; write it without encryption, as zstd or snappy") from error
        if head == b"PAR1":
            found = f"{part.size_bytes} bytes, {found}; write the file again or remove it"
            raise BadFileError(f"{part.uri}: E_PARQUET_TRUNCATED, {found}") from error
        found = f"starts with {head!r}; rename it, write it again or remove it"
        raise BadFileError(f"{part.uri}: E_NOT_PARQUET, {found}") from error


def _compressed(group: Any) -> int:
    return sum(int(group.column(column).total_compressed_size) for column in range(group.num_columns))


def _check_codecs(part: Slice, group: Any) -> None:
    for codec in {group.column(column).compression for column in range(group.num_columns)} - {"UNCOMPRESSED"}:
        if not _is_available(codec):
            raise BadFileError(f"{part.uri}: E_UNSUPPORTED, codec {codec}; write it as zstd or snappy")


def _is_available(codec: str) -> bool:
    try:
        return bool(pa.Codec.is_available(codec.lower()))
    except ValueError:  # a name that Arrow has never heard of
        return False


def _check_types(columns: Columns, schema: Any, uri: str) -> None:
    """Columns hold what they may hold."""
    for name in columns.names:
        kind = schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if name in {columns.text, columns.title} and not _is_text(kind):
            raise BadFileError(f"{uri}: E_TYPE, column {name!r} is {kind}, expected strings; set corpus.text or convert it")
        if name == columns.id and not (_is_text(kind) or pa.types.is_integer(kind)):
            raise BadFileError(f"{uri}: E_TYPE, column {name!r} is {kind}, expected strings or integers; set corpus.id")


def _is_text(kind: Any) -> bool:
    tests = ("is_string", "is_large_string", "is_string_view", "is_binary", "is_large_binary", "is_binary_view", "is_null")
    return any(getattr(pa.types, test)(kind) for test in tests)
