"""Ingest units: planning what one ingest task reads, and ingesting it.

A unit is named by the hash of what it reads (file, content, columns, splitting), so a file that did not change is never
read again. Rows of a part are sorted by key; beside the parts lies a row per document: who it is and what it says.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from pipeline import layout
from pipeline.config import Config, StoreConfig
from pipeline.corpus import RejectedRow, SourceDocument, choose_files, read_documents
from pipeline.errors import BadFileError
from pipeline.fingerprint import fingerprint
from pipeline.listing import FileInfo, content_hash, list_files
from pipeline.manifest import DataFile, InputFile, Record, put_data, put_record
from pipeline.parquet_input import row_group_bytes
from pipeline.passages import KEY_BYTES, Passage, Splitter, passage_key
from pipeline.shards import KEY_DTYPE, fixed_binary, parquet_bytes
from pipeline.slices import Slice
from pipeline.storage import Storage

BATCH_DOCUMENTS = 256
UNIT_BYTES = 64 << 20
"""Input per ingest unit. Constant, because it decides the names of units and so what is done again."""
PART_PASSAGES = 1 << 15
PART_CHARS = 64 << 20
"""Passages and text per part file: bounds the memory of an ingest task whatever the size of its input file."""
SPARSE_CHARS, SPARSE_RATIO = 1000, 50
"""A long text of so many characters per token is one the tokenizer does not know: base64, another script."""

PASSAGE_SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(KEY_BYTES), nullable=False),
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("passage", pa.int32(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("end", pa.int64(), nullable=False),
        pa.field("text", pa.large_string(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
        pa.field("source_uri", pa.string(), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),
        pa.field("metadata", pa.string()),
    ]
)
REJECTED_SCHEMA = pa.schema(
    [
        pa.field("source_uri", pa.string(), nullable=False),
        pa.field("source_row", pa.int64()),
        pa.field("doc_id", pa.string()),
        pa.field("code", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("text_sha256", pa.string()),
        pa.field("text_head", pa.string()),
    ]
)
DOCUMENT_SCHEMA = pa.schema(
    [
        pa.field("document", pa.binary(KEY_BYTES), nullable=False),
        pa.field("text", pa.binary(KEY_BYTES), nullable=False),
        pa.field("source_uri", pa.string(), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),
    ]
)
COUNTS = ("rows", "documents", "rejected", "skipped_files", "passages", "split", "truncated", "sparse", "tokens")


class IngestUnit(BaseModel):
    """What one ingest task reads. ``limit``: at most so many documents (a run with ``--limit``)."""

    model_config = ConfigDict(frozen=True)
    name: str
    slices: tuple[Slice, ...]
    limit: int | None = None


@dataclass(frozen=True)
class CorpusFiles:
    """The corpus files with their formats, by URI, and the URIs of the listed files that are none of it."""

    chosen: list[tuple[InputFile, str]]
    ignored: tuple[str, ...]


def identify_files(config: Config, known: Iterable[InputFile] = ()) -> CorpusFiles:
    """The corpus files, each with its format and a content identity: the etag, or on local disk the hash.

    A local file whose size and modification time are those of ``known`` is not hashed again.
    """
    seen = {(file.uri, file.size_bytes, file.stamp): file.content for file in known}
    listed = list_files(config.corpus.uri, config.store)
    chosen = choose_files([file for file in listed if not file.hidden], config.corpus)
    taken = {file.uri for file, _ in chosen}
    return CorpusFiles(
        [(_identified(info, seen), file_format) for info, file_format in chosen],
        tuple(file.uri for file in listed if file.uri not in taken),
    )


def deletes_config(config: Config) -> Config:
    """The config whose corpus are the files of ``corpus.deletes``."""
    return config.model_copy(
        update={"corpus": config.corpus.model_copy(update={"uri": config.corpus.deletes, "format": "auto"})}
    )


def plan_units(files: Sequence[tuple[InputFile, str]], config: Config, space: str) -> list[IngestUnit]:
    """Cut large Parquet files into runs of row groups and pack small files together, stably.

    Small files go to buckets by the hash of their URI, so that one changed file redoes one bucket.
    """
    small = [(file, kind) for file, kind in files if file.size_bytes < UNIT_BYTES // 8]
    buckets = 1 << max(0, (sum(file.size_bytes for file, _ in small) // UNIT_BYTES).bit_length())
    packed: dict[int, list[Slice]] = {}
    units: list[tuple[Slice, ...]] = []
    for file, kind in files:
        part = Slice(uri=file.uri, size_bytes=file.size_bytes, stamp=file.stamp, content=file.content, format=kind)
        if file.size_bytes < UNIT_BYTES // 8:
            packed.setdefault(int(fingerprint(file.uri, length=8), 16) % buckets, []).append(part)
        elif kind == "parquet" and file.size_bytes > UNIT_BYTES:
            units += [(run,) for run in _row_group_runs(part, config.store)]
        else:
            units.append((part,))
    units += [tuple(slices) for _, slices in sorted(packed.items())]
    return [IngestUnit(name=_unit_name(slices, config, space, None), slices=slices) for slices in units]


def limited(unit: IngestUnit, limit: int, config: Config, space: str) -> IngestUnit:
    """The same unit, cut after ``limit`` documents: other content, so another name."""
    return IngestUnit(name=_unit_name(unit.slices, config, space, limit), slices=unit.slices, limit=limit)


def reading(config: Config, space: str) -> dict[str, Any]:
    """What decides how files become passages, whatever the files: the part of a unit's name that all units share."""
    return {
        "corpus": config.corpus.model_dump(include={"uri", "id", "text", "title", "metadata"}, mode="json"),
        "skips": config.corpus.on_error == "skip_file",
        "passages": config.passages.model_dump(mode="json"),
        "space": space,
    }


def count_done(storage: Storage, units: Iterable[IngestUnit]) -> int:
    """How many of the units have their record, and so need not be read again."""
    return sum(storage.exists(layout.ingest_record(unit.name)) for unit in units)


@dataclass
class _Draft:
    """What a unit has given so far. ``bad``: the slices that are skipped because they cannot be read."""

    storage: Storage
    stem: str
    bad: dict[Slice, BadFileError] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    files: list[DataFile] = field(default_factory=list)
    rejected: list[RejectedRow] = field(default_factory=list)
    documents: list[tuple[bytes, bytes, str, int]] = field(default_factory=list)
    buffer: list[dict[str, Any]] = field(default_factory=list)
    chars: int = 0
    taken: int = 0

    def add(self, document: SourceDocument, passages: Sequence[Passage]) -> None:
        """Take a document; whole parts are stored as they fill."""
        self.counts["documents"] += 1
        self.counts["passages"] += len(passages)
        self.counts["split"] += len(passages) > 1
        self.counts["truncated"] += any(passage.truncated for passage in passages)
        tokens = sum(passage.tokens for passage in passages)
        self.counts["tokens"] += tokens
        self.counts["sparse"] += len(document.text) > SPARSE_CHARS and len(document.text) > SPARSE_RATIO * tokens
        where = (document.source_uri, document.source_row)
        self.documents.append((passage_key(document.doc_id), passage_key(document.text), *where))
        source = dict(zip(("source_uri", "source_row", "metadata"), (*where, document.metadata), strict=True))
        self.buffer += [
            {"doc_id": document.doc_id, "passage": number, **asdict(each), **source} for number, each in enumerate(passages)
        ]
        self.chars += len(document.text)
        if len(self.buffer) >= PART_PASSAGES or self.chars >= PART_CHARS:
            self.flush()

    def flush(self) -> None:
        """Store what is waiting as a part, sorted by key."""
        if self.buffer:
            self.buffer.sort(key=lambda row: (row["key"], row["doc_id"], row["passage"]))
            table = pa.Table.from_pylist(self.buffer, schema=PASSAGE_SCHEMA)
            data = parquet_bytes(table, compress=True)
            self.files.append(put_data(self.storage, self.stem, ".parquet", data, len(self.buffer)))
        self.buffer, self.chars = [], 0

    def put_rejected(self) -> DataFile | None:
        """Store the rejected rows and the skipped files."""
        bad = [RejectedRow(part.uri, None, None, error.code, str(error), None, None) for part, error in self.bad.items()]
        rows = [asdict(row) for row in bad + self.rejected]
        if not rows:
            return None
        data = parquet_bytes(pa.Table.from_pylist(rows, schema=REJECTED_SCHEMA), compress=True)
        return put_data(self.storage, self.stem, ".rejected.parquet", data, len(rows))

    def put_documents(self) -> DataFile:
        """Store who the documents are, in the order of their keys."""
        order = sorted(range(len(self.documents)), key=lambda row: self.documents[row])
        rows = [self.documents[row] for row in order]
        keys = [fixed_binary(np.array([row[place] for row in rows], dtype=KEY_DTYPE)) for place in (0, 1)]
        columns = [*keys, pa.array([row[2] for row in rows], pa.string()), pa.array([row[3] for row in rows], pa.int64())]
        data = parquet_bytes(pa.Table.from_arrays(columns, schema=DOCUMENT_SCHEMA), compress=True)
        return put_data(self.storage, self.stem, ".documents.parquet", data, len(rows))


def ingest_unit(unit: IngestUnit, config: Config, splitter: Splitter, storage: Storage) -> Record:
    """Read, check, split and store the rows of one unit; the record is created last.

    Raises BadFileError on a file that cannot be read, unless ``corpus.on_error`` says to skip it.
    """
    started = time.perf_counter()
    draft = _Draft(storage, f"{layout.PASSAGES}/{unit.name}")
    while not _is_read(unit, config, splitter, draft):
        draft = _Draft(storage, draft.stem, draft.bad)  # what a bad file gave before it broke is not kept
    counts = draft.counts | {"skipped_files": len(draft.bad)}
    if counts["rows"] != counts["documents"] + counts["rejected"]:
        raise AssertionError(f"unit {unit.name}: rows in {counts['rows']} != documents + rejected in {counts}")
    record = Record(
        unit=unit.name,
        files=tuple(draft.files),
        rejected=draft.put_rejected(),
        documents=draft.put_documents(),
        counts=counts,
        timings_s={"total": time.perf_counter() - started},
    )
    return put_record(storage, layout.PASSAGES, record)


def _is_read(unit: IngestUnit, config: Config, splitter: Splitter, draft: _Draft) -> bool:
    """Read the slices of a unit that are not bad; False when another one turned out to be, and is now among them."""
    for part in unit.slices:
        if part in draft.bad:
            continue
        try:
            for batch in _batches(_documents(part, unit.limit, config, draft), BATCH_DOCUMENTS):
                for document, passages in zip(batch, splitter([each.text for each in batch]), strict=True):
                    draft.add(document, passages)
        except BadFileError as error:
            if config.corpus.on_error != "skip_file":
                raise
            draft.bad[part] = error
            return False
    draft.flush()
    return True


def _documents(part: Slice, limit: int | None, config: Config, draft: _Draft) -> Iterator[SourceDocument]:
    """The good rows of a slice, up to the unit's limit; the others are put aside."""
    for row in read_documents(part, config.corpus, config.store):
        if limit is not None and draft.taken >= limit:
            return
        draft.counts["rows"] += 1
        if isinstance(row, RejectedRow):
            draft.counts["rejected"] += 1
            draft.rejected.append(row)
        else:
            draft.taken += 1
            yield row


def _batches(documents: Iterator[SourceDocument], size: int) -> Iterator[list[SourceDocument]]:
    while batch := list(islice(documents, size)):
        yield batch


def _identified(info: FileInfo, seen: dict[tuple[str, int, str], str]) -> InputFile:
    known = seen.get((info.uri, info.size_bytes, info.stamp))
    content = known if known is not None else content_hash(info)
    return InputFile(uri=info.uri, size_bytes=info.size_bytes, stamp=info.stamp, content=content)


def _row_group_runs(part: Slice, store: StoreConfig) -> Iterator[Slice]:
    first, total = 0, 0
    sizes = row_group_bytes(part, store)
    for group, size in enumerate(sizes):
        total += size
        if total >= UNIT_BYTES or group == len(sizes) - 1:
            yield part.model_copy(update={"first_row_group": first, "end_row_group": group + 1})
            first, total = group + 1, 0


def _unit_name(slices: Sequence[Slice], config: Config, space: str, limit: int | None) -> str:
    what: dict[str, Any] = {"slices": [part.model_dump(exclude={"stamp"}) for part in slices], "limit": limit}
    return fingerprint({"ingest": 2, **what, **reading(config, space)})
