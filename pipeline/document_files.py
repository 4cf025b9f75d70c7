"""The documents of an artifact: Parquet rows (ordinal, document, passage, text) sorted by ordinal, in files of bounded length.

A Parquet writer holds 9 KB for every row group until its file is closed, and as much again to close it (measured, pyarrow
26); a reader has to parse the whole footer. So a file ends after some thousand row groups, and is opened when it is asked.
"""

import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.ingestion import PASSAGE_SCHEMA
from pipeline.manifest import DocumentsFile
from pipeline.recall import Ordinals

ROW_GROUP_ROWS = 512
"""Rows read to show one hit."""
FILE_ROWS = 1 << 20
OPEN_FILES = 64
BATCH_ROWS = 1 << 13

SCHEMA = pa.schema(
    [
        pa.field("ordinal", pa.int64(), nullable=False),
        *(field for field in PASSAGE_SCHEMA if field.name not in {"key", "tokens"}),
    ]
)
ORDER = [("ordinal", "ascending"), ("doc_id", "ascending"), ("passage", "ascending")]


class DocumentsWriter:
    """Writes ``documents.parquet`` for at most ``rows`` rows, or ``documents-0000.parquet`` and on where those are too many."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.files: list[DocumentsFile] = []
        self.rows = 0
        self._folder = folder
        self._is_one = rows <= FILE_ROWS
        self._file = self._begin(0)

    def write(self, table: Any) -> None:
        """Add all rows of the next ordinals; the rows of one ordinal are in one call, so in one file."""
        if not len(table):
            return
        if self.files[-1].rows >= FILE_ROWS and not self._is_one:
            self._file.close()
            self._file = self._begin(pc.min(table.column("ordinal")).as_py())
        self._file.write_table(table.sort_by(ORDER).cast(SCHEMA), row_group_size=ROW_GROUP_ROWS)
        self.rows += len(table)
        self.files[-1] = self.files[-1].model_copy(update={"rows": self.files[-1].rows + len(table)})

    def __enter__(self) -> "DocumentsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def _begin(self, first: int) -> pq.ParquetWriter:
        name = "documents.parquet" if self._is_one else f"documents-{len(self.files):04d}.parquet"
        self.files.append(DocumentsFile(name=name, first=first, rows=0))
        return pq.ParquetWriter(
            self._folder / name, SCHEMA, compression="zstd", write_page_checksum=True, write_statistics=["ordinal"]
        )


class Documents:
    """Reads the rows of ordinals from the files of a local artifact folder."""

    def __init__(self, folder: Path, files: Sequence[DocumentsFile]) -> None:
        self._files = files
        self._firsts = np.array([file.first for file in files], dtype=np.int64)
        # what is mapped can be read when gc or purge has deleted the files
        self._maps = [pa.memory_map(str(folder / file.name)).read_buffer() for file in files]
        opened = partial(_open, self._maps)  # not a method: a cycle would keep the files open until it is collected
        self._opened = lru_cache(maxsize=OPEN_FILES)(opened)

    def rows(self, ordinals: Ordinals) -> dict[int, list[dict[str, Any]]]:
        """The rows of each ordinal, by doc_id."""
        rows: dict[int, list[dict[str, Any]]] = {int(ordinal): [] for ordinal in ordinals}
        wanted = np.array(sorted(rows), dtype=np.int64)
        owners = np.searchsorted(self._firsts, wanted, side="right") - 1
        for number in np.unique(owners):
            for row in self._rows_in(int(number), wanted[owners == number]):
                rows[row["ordinal"]].append(row)
        return rows

    def batches(self, columns: Sequence[str]) -> Iterator[tuple[str, int, Any]]:
        """Every row as (file name, number of its first row in that file, record batch)."""
        for file, mapped in zip(self._files, self._maps, strict=True):
            first = 0
            parquet = pq.ParquetFile(pa.BufferReader(mapped), page_checksum_verification=True)
            for batch in parquet.iter_batches(BATCH_ROWS, columns=list(columns)):
                yield file.name, first, batch
                first += len(batch)

    def texts(self) -> Iterator[list[str]]:
        """The text of each ordinal, in order, some at a time."""
        last = -1
        for _, _, batch in self.batches(["ordinal", "text"]):
            ordinals = batch.column("ordinal").to_numpy()
            is_new = np.diff(ordinals, prepend=last) > 0
            yield batch.column("text").filter(pa.array(is_new)).to_pylist()
            last = ordinals[-1]

    def passages_of(self, doc_id: str) -> dict[int, int]:
        """Ordinal of each passage of a document, by passage number; reads the ids of all documents."""
        found: dict[int, int] = {}
        for _, _, batch in self.batches(["doc_id", "passage", "ordinal"]):
            rows = batch.filter(pc.equal(batch.column("doc_id"), doc_id))
            found |= dict(zip(rows.column("passage").to_pylist(), rows.column("ordinal").to_pylist(), strict=True))
        return found

    def _rows_in(self, number: int, ordinals: Ordinals) -> list[dict[str, Any]]:
        parquet, firsts = self._opened(number, threading.get_ident())
        groups = sorted({group for ordinal in ordinals for group in _groups_of(firsts, int(ordinal))})
        table = parquet.read_row_groups(groups)
        chosen = np.isin(table.column("ordinal").to_numpy(), ordinals)
        return cast(list[dict[str, Any]], table.filter(pa.array(chosen)).to_pylist())


def _open(maps: Sequence[pa.Buffer], number: int, thread: int) -> tuple[pq.ParquetFile, npt.NDArray[np.int64]]:
    """A file, and the first ordinal of each of its row groups.

    Opened for each ``thread``: two that read from one handle find "no matching cache entry" (pyarrow 26).
    """
    del thread
    parquet = pq.ParquetFile(pa.BufferReader(maps[number]), page_checksum_verification=True)
    metadata = parquet.metadata
    column = metadata.schema.names.index("ordinal")
    groups = (metadata.row_group(group).column(column) for group in range(metadata.num_row_groups))
    return parquet, np.array([group.statistics.min for group in groups], dtype=np.int64)


def _groups_of(firsts: npt.NDArray[np.int64], ordinal: int) -> range:
    """Row groups that may hold an ordinal; many documents with one text can span several."""
    first = int(np.searchsorted(firsts, ordinal, side="left"))
    last = int(np.searchsorted(firsts, ordinal, side="right"))
    return range(max(0, first - 1), last)
