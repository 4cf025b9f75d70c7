"""Parquet files of the pipeline: fixed-width rows with page checksums, and reading them back in key order.

Keys and vectors are ``fixed_size_binary``: read as one buffer at 2.4 GB/s, where a list column takes 0.3
(measured, pyarrow 26). All columns are non-nullable, so no row can be dropped while flattening.
"""

import contextlib
import io
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import VerificationError
from pipeline.root.manifest import DataFile
from pipeline.root.storage import Storage

KEY_BYTES = 16
"""Of the hash of a text that a passage is known by."""
Keys = npt.NDArray[np.bytes_]
"""(n,) of dtype S16: compares as the 16 bytes do. Take bytes with ``tobytes``; indexing strips trailing zeros."""
KEY_DTYPE = np.dtype(f"S{KEY_BYTES}")
ROW_GROUP_ROWS = 2048
AHEAD_BYTES = 1 << 20
"""What each of many remote files that are read forward together reads ahead at least: a request per row group or so."""
NOTHING_MASKED = np.empty(0, dtype=np.int64)


def fixed_binary(values: npt.NDArray[Any]) -> Any:
    """(n, w) rows of any dtype, or (n,) keys -> Arrow ``fixed_size_binary`` of n values."""
    values = np.ascontiguousarray(values)
    width = values.dtype.itemsize * (values.shape[1] if values.ndim == 2 else 1)
    return pa.Array.from_buffers(pa.binary(width), len(values), [None, pa.py_buffer(values.tobytes())])


def to_rows(column: Any, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Arrow ``fixed_size_binary`` -> (n, w) of ``dtype`` (keys: (n,) of S16), a read-only view where it can be."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    width = array.type.byte_width
    flat = np.frombuffer(array.buffers()[1], dtype=np.uint8)[array.offset * width : (array.offset + len(array)) * width]
    rows = flat.view(dtype)
    return rows if rows.dtype.itemsize == width else rows.reshape(len(array), -1)


def keys_of(column: Any) -> Keys:
    """Arrow column of keys -> (n,) S16."""
    return cast(Keys, to_rows(column, KEY_DTYPE))


def is_among(keys: Keys, known: Keys) -> npt.NDArray[np.bool_]:
    """For each key whether it is in ``known`` (sorted), both (n,) S16."""
    if not len(known):
        return np.zeros(len(keys), dtype=bool)
    places = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return cast(npt.NDArray[np.bool_], known[places] == keys)


def parquet_bytes(table: Any, *, compress: bool) -> bytes:
    """A whole Parquet file, built in memory so that storage sees it in one put."""
    buffer = io.BytesIO()
    pq.write_table(
        table,
        buffer,
        row_group_size=ROW_GROUP_ROWS,
        compression="zstd" if compress else "none",
        use_dictionary=compress,
        write_page_checksum=True,
    )
    return buffer.getvalue()


def open_parquet(storage: Storage, folder: str, file: DataFile, ahead_bytes: int | None = None) -> Any:
    """A ParquetFile that checks pages as it reads; raises VerificationError when the file is not the one recorded.

    ``ahead_bytes``: what a remote file that is one of many may read ahead. None: the columns of a row group are read at once,
    whose bytes are kept as long as the file is open (pyarrow 26).
    """
    where = f"{folder}/{file.name}"
    with _reading(storage, where):
        handle = storage.open(where, ahead_bytes)
        parquet = pq.ParquetFile(handle, page_checksum_verification=True, pre_buffer=ahead_bytes is None)
    if parquet.metadata.num_rows != file.rows:
        raise VerificationError(
            f"{storage.at(where)}: {parquet.metadata.num_rows} rows, its record says {file.rows}; delete both"
        )
    return parquet


def read_columns(storage: Storage, folder: str, file: DataFile, columns: Sequence[str]) -> Any:
    """Some columns of a whole file as an Arrow table."""
    return read_rows(storage, folder, file, columns, 0, file.rows)


def read_rows(storage: Storage, folder: str, file: DataFile, columns: Sequence[str], first: int, end: int) -> Any:
    """Rows ``first`` to ``end`` of some columns, reading only the row groups that hold them."""
    groups = range(first // ROW_GROUP_ROWS, -(-end // ROW_GROUP_ROWS))
    table = read_row_groups(storage, folder, file, columns, groups)
    return table.slice(first - groups.start * ROW_GROUP_ROWS, end - first)


def read_row_groups(storage: Storage, folder: str, file: DataFile, columns: Sequence[str], groups: Iterable[int]) -> Any:
    """Some columns of some row groups; raises VerificationError where the file is damaged."""
    with open_parquet(storage, folder, file) as parquet, _reading(storage, f"{folder}/{file.name}"):
        return parquet.read_row_groups(list(groups), columns=list(columns))


@contextlib.contextmanager
def _reading(storage: Storage, path: str) -> Iterator[None]:
    """A block that reads a file: one that is damaged or gone is told from a storage that does not give it."""
    try:
        with storage.explained("read", path):
            try:
                yield
            except OSError as error:
                if is_storages(error):
                    raise
                raise pa.ArrowInvalid(str(error)) from error
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise VerificationError(f"{storage.at(path)}: not readable, {error}; delete it and its record, run again") from error


def is_storages(error: Exception) -> bool:
    """Whether it is a file's or a store's, which have a number or a class, and not Arrow's, of bytes that make no sense to it.

    One of gcsfs has neither (``retry.validate_response``).
    """
    if not isinstance(error, OSError):
        return False
    return type(error) is not OSError or error.errno is not None or str(error).startswith("Forbidden: ")


def read_keys(storage: Storage, folder: str, file: DataFile) -> Keys:
    """The key column of a file."""
    return keys_of(read_columns(storage, folder, file, ["key"]).column("key"))


def key_bounds(rows: int, at_once: int) -> Iterator[bytes | None]:
    """Upper ends of equal ranges of keys that hold about ``at_once`` of ``rows`` each; None is the last one's."""
    ranges = max(1, -(-rows // at_once))
    width = KEY_DTYPE.itemsize
    for number in range(1, ranges):
        yield ((number << (8 * width)) // ranges).to_bytes(width, "big")
    yield None


class Cursor:
    """Reads a Parquet file forward, one row group in memory at a time, ``masked`` rows left out."""

    def __init__(
        self,
        storage: Storage,
        folder: str,
        file: DataFile,
        columns: Sequence[str],
        masked: npt.NDArray[np.int64] = NOTHING_MASKED,
        ahead_bytes: int = AHEAD_BYTES,
    ) -> None:
        self._parquet = open_parquet(storage, folder, file, ahead_bytes)
        self._reading = partial(_reading, storage, f"{folder}/{file.name}")
        self._columns = list(columns)
        self.schema = self._parquet.schema_arrow
        self.rows = file.rows
        self._empty = self.schema.empty_table().select(self._columns)
        self._group = 0
        self._masked = masked
        self._table: Any = None

    def take(self, count: int) -> list[Any]:
        """Tables of the next ``count`` rows, or of those that are left; at least an empty one."""
        taken = [self._empty]
        while count and self._load():
            taken.append(self._advance(min(count, self._table.num_rows)))
            count -= taken[-1].num_rows
        return taken

    def take_until(self, bound: bytes | None) -> list[Any]:
        """The same of all rows not yet taken whose key is below ``bound`` (None: all); the file is sorted by ``key``."""
        taken = [self._empty]
        while self._load():
            rows = self._table.num_rows
            end = rows if bound is None else int(np.searchsorted(keys_of(self._table.column("key")), np.bytes_(bound)))
            taken.append(self._advance(end))
            if end < rows:
                break
        return taken

    def _load(self) -> bool:
        """Have a row group with rows left; False at the end of the file."""
        while self._table is None or not self._table.num_rows:
            if self._group == self._parquet.num_row_groups:
                self._table = None
                self._parquet.close(force=True)  # else what the file has read ahead stays
                return False
            with self._reading():
                self._table = self._parquet.read_row_group(self._group, columns=self._columns)
            first = self._group * ROW_GROUP_ROWS
            masked = self._masked[(self._masked >= first) & (self._masked < first + ROW_GROUP_ROWS)] - first
            if len(masked):
                self._table = self._table.take(np.delete(np.arange(self._table.num_rows), masked))
            self._group += 1
        return True

    def _advance(self, count: int) -> Any:
        head, self._table = self._table.slice(0, count), self._table.slice(count)
        return head
