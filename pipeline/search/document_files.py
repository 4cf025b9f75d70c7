"""The documents of an artifact: rows (ordinal, document, passage, text) sorted by ordinal, in Arrow IPC files of bounded size.

Not Parquet: a hit is one row of ten columns somewhere in the file. From Parquet ten hits cost 4 ms, by Arrow's record batches
under LZ4 0.5 ms, for 1.9 times the bytes of Parquet with zstd (454,598 rows, pyarrow 26); without compression they are
hardly faster and three times as large. One thread decompresses a batch faster than several do.
"""

from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.ann.recall import Ordinals
from pipeline.ingest.ingestion import PASSAGE_SCHEMA
from pipeline.root.manifest import DocumentsFile

SHOWN_ROWS = 64
"""Rows of a record batch: what is decompressed to show one hit."""
WALKED_BATCHES = 128
"""Record batches read together where every row is read."""
FILE_ROWS = 1 << 20
KNOWN_FILES = 1 << 10
"""Files whose record batches are known by their first ordinal, after a hit in them: 128 KB each."""

SCHEMA = pa.schema(
    [
        pa.field("ordinal", pa.int64(), nullable=False),
        *(field for field in PASSAGE_SCHEMA if field.name not in {"key", "tokens"}),
    ]
)
ORDER = [("ordinal", "ascending"), ("doc_id", "ascending"), ("passage", "ascending")]


class DocumentsWriter:
    """Writes ``documents.arrow`` for at most ``rows`` rows, or ``documents-0000.arrow`` and on where those are too many."""

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
        self._file.write_table(table.sort_by(ORDER).cast(SCHEMA), max_chunksize=SHOWN_ROWS)
        self.rows += len(table)
        self.files[-1] = self.files[-1].model_copy(update={"rows": self.files[-1].rows + len(table)})

    def __enter__(self) -> "DocumentsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def _begin(self, first: int) -> pa.RecordBatchFileWriter:
        name = "documents.arrow" if self._is_one else f"documents-{len(self.files):04d}.arrow"
        self.files.append(DocumentsFile(name=name, first=first, rows=0))
        return pa.ipc.new_file(self._folder / name, SCHEMA, options=pa.ipc.IpcWriteOptions(compression="lz4"))


class Documents:
    """Reads the rows of ordinals from the files of a local artifact folder."""

    def __init__(self, folder: Path, files: Sequence[DocumentsFile]) -> None:
        self._files = files
        self._firsts = np.array([file.first for file in files], dtype=np.int64)
        # what is mapped can be read when gc or purge has deleted the files
        self._maps = [pa.memory_map(str(folder / file.name)).read_buffer() for file in files]
        firsts = partial(_firsts, self._maps)  # not a method: a cycle would keep the files open until it is collected
        self._firsts_in = lru_cache(maxsize=KNOWN_FILES)(firsts)

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
            for batch in walked(mapped, columns):
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

    def ids(self) -> set[str]:
        """Those of all documents."""
        return {doc_id for _, _, batch in self.batches(["doc_id"]) for doc_id in batch.column("doc_id").to_pylist()}

    def texts_of(self, doc_ids: Collection[str]) -> dict[str, list[str]]:
        """The passages of documents, in order; reads the ids and texts of all documents."""
        wanted = pa.array(sorted(doc_ids), pa.string())
        found: dict[str, dict[int, str]] = {}
        for _, _, batch in self.batches(["doc_id", "passage", "text"]):
            rows = batch.filter(pc.is_in(batch.column("doc_id"), wanted))
            for row in rows.to_pylist():
                found.setdefault(row["doc_id"], {})[row["passage"]] = row["text"]
        return {doc_id: [texts[passage] for passage in sorted(texts)] for doc_id, texts in found.items()}

    def _rows_in(self, number: int, ordinals: Ordinals) -> list[dict[str, Any]]:
        reader, firsts = _read(self._maps[number]), self._firsts_in(number)  # a reader of its own: they are not for threads
        begins = np.maximum(firsts.searchsorted(ordinals, "left") - 1, 0)  # many documents with one text span several batches
        ends = firsts.searchsorted(ordinals, "right")
        found: list[pa.RecordBatch] = []
        read = -1
        for ordinal, begin, end in zip(ordinals.tolist(), begins.tolist(), ends.tolist(), strict=True):
            for batch_number in range(begin, end):
                if batch_number != read:
                    batch, read = reader.get_batch(batch_number), batch_number
                    held = batch.column("ordinal").to_numpy()
                first = held.searchsorted(ordinal, "left")
                found.append(batch.slice(first, held.searchsorted(ordinal, "right") - first))
        return cast(list[dict[str, Any]], pa.concat_batches(found).to_pylist())


def walked(source: Any, columns: Collection[str]) -> Iterator[pa.RecordBatch]:
    """Those of the columns that an Arrow IPC file has, row by row in its order, many record batches at a time."""
    fields = [number for number, name in enumerate(pa.ipc.open_file(source).schema.names) if name in columns]
    reader = _read(source, fields)
    for start in range(0, reader.num_record_batches if fields else 0, WALKED_BATCHES):
        numbers = range(start, min(start + WALKED_BATCHES, reader.num_record_batches))
        yield pa.concat_batches([reader.get_batch(number) for number in numbers])


def _read(source: Any, fields: Sequence[int] | None = None) -> pa.RecordBatchFileReader:
    """Reads all fields of an Arrow IPC file or some, in the order of the file."""
    return pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(use_threads=False, included_fields=fields))


def _firsts(maps: Sequence[pa.Buffer], number: int) -> npt.NDArray[np.int64]:
    """The first ordinal of each record batch of a file."""
    reader = _read(maps[number], [SCHEMA.get_field_index("ordinal")])
    firsts = (reader.get_batch(batch).column(0)[0].as_py() for batch in range(reader.num_record_batches))
    return np.fromiter(firsts, dtype=np.int64, count=reader.num_record_batches)
