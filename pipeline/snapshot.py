"""The corpus at one moment: planning its ingest units, ingesting one, and the manifest over them.

An ingest unit is named by the hash of what it reads (file, content, columns, splitting), so a file that did
not change is never read again, and a snapshot is only a list of units. Rows of a part are sorted by key.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from pipeline import layout
from pipeline.config import Config, StoreConfig
from pipeline.corpus import RejectedRow, SourceDocument, choose_files, read_documents
from pipeline.errors import DataError, VerificationError
from pipeline.fingerprint import fingerprint
from pipeline.formats import Slice, row_group_bytes
from pipeline.log import Log
from pipeline.manifest import ArtifactManifest, DataFile, InputFile, Record, SnapshotManifest, load, put_data, put_record
from pipeline.passages import KEY_BYTES, Passage, Splitter
from pipeline.shards import KEY_DTYPE, Keys, parquet_bytes, read_keys
from pipeline.storage import FileInfo, Storage, content_hash, list_files

BATCH_DOCUMENTS = 256
UNIT_BYTES = 64 << 20
"""Input per ingest unit. Constant, because it decides the names of units and so what is done again."""
PART_PASSAGES = 1 << 15
PART_CHARS = 64 << 20
"""Passages and text per part file: bounds the memory of an ingest task whatever the size of its input file."""

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
        pa.field("source_row", pa.int64(), nullable=False),
        pa.field("doc_id", pa.string()),
        pa.field("code", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("text_sha256", pa.string()),
        pa.field("text_head", pa.string()),
    ]
)
COUNTS = ("rows", "documents", "rejected", "passages", "split", "truncated", "tokens")


class IngestUnit(BaseModel):
    """What one ingest task reads. ``limit``: at most so many documents (a run with ``--limit``)."""

    model_config = ConfigDict(frozen=True)
    name: str
    slices: tuple[Slice, ...]
    limit: int | None = None


def identify_files(config: Config, known: Iterable[InputFile] = ()) -> list[tuple[InputFile, str]]:
    """The corpus files, each with its format and a content identity: the etag, or on local disk the hash.

    A local file whose size and modification time are those of ``known`` is not hashed again.
    """
    seen = {(file.uri, file.size_bytes, file.stamp): file.content for file in known}
    return [
        (InputFile(uri=info.uri, size_bytes=info.size_bytes, stamp=info.stamp, content=_content(info, seen)), file_format)
        for info, file_format in choose_files(list_files(config.corpus.uri, config.store), config.corpus)
    ]


def plan_units(files: Sequence[tuple[InputFile, str]], config: Config, space: str) -> list[IngestUnit]:
    """Cut large Parquet files into runs of row groups and pack small files together, stably.

    Small files go to buckets by the hash of their URI, so that one changed file redoes one bucket.
    """
    small = [(file, kind) for file, kind in files if file.size_bytes < UNIT_BYTES // 8]
    buckets = 1 << max(0, (sum(file.size_bytes for file, _ in small) // UNIT_BYTES).bit_length())
    packed: dict[int, list[Slice]] = {}
    units: list[tuple[Slice, ...]] = []
    for file, kind in files:
        part = Slice(uri=file.uri, size_bytes=file.size_bytes, content=file.content, format=kind)
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


def ingest_unit(unit: IngestUnit, config: Config, splitter: Splitter, storage: Storage) -> Record:
    """Read, check, split and store the rows of one unit; the record is created last. Raises DataError on a broken file."""
    started = time.perf_counter()
    counts = dict.fromkeys(COUNTS, 0)
    stem = f"{layout.PASSAGES}/{unit.name}"
    files: list[DataFile] = []
    rejected: list[RejectedRow] = []
    buffer: list[dict[str, Any]] = []
    chars = 0
    for batch in _batches(_documents(unit, config, rejected, counts), BATCH_DOCUMENTS):
        for document, passages in zip(batch, splitter([document.text for document in batch]), strict=True):
            _count(counts, passages)
            buffer += _rows(document, passages)
        chars += sum(len(document.text) for document in batch)
        if len(buffer) >= PART_PASSAGES or chars >= PART_CHARS:
            files.append(_put_part(storage, stem, buffer))
            buffer, chars = [], 0
    if buffer:
        files.append(_put_part(storage, stem, buffer))
    if counts["rows"] != counts["documents"] + counts["rejected"]:
        raise AssertionError(f"unit {unit.name}: rows in {counts['rows']} != documents + rejected in {counts}")
    quarantine = _put_rejected(storage, stem, rejected) if rejected else None
    timings = {"total": time.perf_counter() - started}
    record = Record(unit=unit.name, files=tuple(files), rejected=quarantine, counts=counts, timings_s=timings)
    return put_record(storage, layout.PASSAGES, record)


def build_snapshot(files: Sequence[InputFile], records: Sequence[Record], limit: int | None) -> SnapshotManifest:
    """The manifest over finished units; its id is the hash of their names, which no modification time enters."""
    units = tuple(sorted(record.unit for record in records))
    counts = {name: sum(record.counts.get(name, 0) for record in records) for name in COUNTS}
    snapshot_id = fingerprint({"units": list(units), "limit": limit})
    return SnapshotManifest(snapshot=snapshot_id, files=tuple(files), units=units, counts=counts, limit=limit)


def check_quality(snapshot: SnapshotManifest, config: Config, root: str) -> None:
    """Raise DataError when more rows were rejected than the config accepts, or none is left."""
    rows, rejected = snapshot.counts["rows"], snapshot.counts["rejected"]
    ceiling = max(config.corpus.max_bad_rows, int(config.corpus.max_bad_fraction * rows))
    if rejected > ceiling:
        raise DataError(
            f"{config.corpus.uri}: {rejected} of {rows} rows rejected, the ceiling is {ceiling}; see "
            f"{root}/{layout.PASSAGES}/*.rejected.parquet, mend the rows or raise corpus.max_bad_fraction / max_bad_rows"
        )
    if not snapshot.counts["documents"]:
        raise DataError(f"{config.corpus.uri}: no document in {rows} rows; check corpus.text and corpus.id")


def count_done(storage: Storage, units: Iterable[IngestUnit]) -> int:
    """How many of the units have their record, and so need not be read again."""
    return sum(storage.exists(layout.ingest_record(unit.name)) for unit in units)


def parts(storage: Storage, snapshot: SnapshotManifest) -> list[DataFile]:
    """Every part file of a snapshot, by unit; raises VerificationError when a record is gone or the rows do not add up."""
    files: list[DataFile] = []
    for unit in snapshot.units:
        record = load(Record, storage, layout.ingest_record(unit))
        if record is None:
            raise VerificationError(f"{storage.at(layout.ingest_record(unit))}: gone, the snapshot names it; run ingest again")
        files += record.files
    if (rows := sum(file.rows for file in files)) != snapshot.counts["passages"]:
        raise VerificationError(
            f"{storage.uri}: {rows} passages in snapshot {snapshot.snapshot}, it counts {snapshot.counts['passages']}"
        )
    return files


def known_files(storage: Storage) -> tuple[InputFile, ...]:
    """Input files of the live artifact's snapshot, whose content is known without reading."""
    live = Log(storage).refresh().live
    manifest = (
        load(ArtifactManifest, storage, f"{layout.artifact(live.artifact)}/manifest.json") if live and live.artifact else None
    )
    snapshot = load(SnapshotManifest, storage, layout.snapshot(manifest.snapshot)) if manifest else None
    return snapshot.files if snapshot else ()


def live_keys(storage: Storage, files: Iterable[DataFile]) -> Keys:
    """Sorted distinct keys of a snapshot, (n,) S16: the ordinal of a passage is its place here."""
    keys = [read_keys(storage, layout.PASSAGES, file) for file in files]
    return np.unique(np.concatenate(keys)) if keys else np.empty(0, dtype=KEY_DTYPE)


def _content(info: FileInfo, seen: dict[tuple[str, int, str], str]) -> str:
    known = seen.get((info.uri, info.size_bytes, info.stamp))
    return known if known is not None else content_hash(info)


def _row_group_runs(part: Slice, store: StoreConfig) -> Iterator[Slice]:
    first, total = 0, 0
    sizes = row_group_bytes(part.uri, store)
    for group, size in enumerate(sizes):
        total += size
        if total >= UNIT_BYTES or group == len(sizes) - 1:
            yield part.model_copy(update={"first_row_group": first, "end_row_group": group + 1})
            first, total = group + 1, 0


def _unit_name(slices: Sequence[Slice], config: Config, space: str, limit: int | None) -> str:
    corpus = config.corpus.model_dump(include={"uri", "id", "text", "title", "metadata"}, mode="json")
    passages = config.passages.model_dump(mode="json")
    what: dict[str, Any] = {
        "slices": [part.model_dump() for part in slices],
        "corpus": corpus,
        "passages": passages,
        "space": space,
        "limit": limit,
    }
    return fingerprint({"ingest": 1, **what})


def _documents(
    unit: IngestUnit, config: Config, rejected: list[RejectedRow], counts: dict[str, int]
) -> Iterator[SourceDocument]:
    for part in unit.slices:
        for row in read_documents(part, config.corpus, config.store):
            if unit.limit is not None and counts["documents"] >= unit.limit:
                return
            counts["rows"] += 1
            if isinstance(row, RejectedRow):
                counts["rejected"] += 1
                rejected.append(row)
            else:
                counts["documents"] += 1
                yield row


def _batches(documents: Iterator[SourceDocument], size: int) -> Iterator[list[SourceDocument]]:
    while batch := list(islice(documents, size)):
        yield batch


def _count(counts: dict[str, int], passages: Sequence[Passage]) -> None:
    counts["passages"] += len(passages)
    counts["split"] += len(passages) > 1
    counts["truncated"] += any(passage.truncated for passage in passages)
    counts["tokens"] += sum(passage.tokens for passage in passages)


def _rows(document: SourceDocument, passages: Sequence[Passage]) -> list[dict[str, Any]]:
    source = {"source_uri": document.source_uri, "source_row": document.source_row, "metadata": document.metadata}
    return [
        {"doc_id": document.doc_id, "passage": number, **asdict(passage), **source} for number, passage in enumerate(passages)
    ]


def _put_part(storage: Storage, stem: str, rows: list[dict[str, Any]]) -> DataFile:
    rows.sort(key=lambda row: (row["key"], row["doc_id"], row["passage"]))
    table = pa.Table.from_pylist(rows, schema=PASSAGE_SCHEMA)
    return put_data(storage, stem, ".parquet", parquet_bytes(table, compress=True), len(rows))


def _put_rejected(storage: Storage, stem: str, rows: list[RejectedRow]) -> DataFile:
    table = pa.Table.from_pylist([asdict(row) for row in rows], schema=REJECTED_SCHEMA)
    return put_data(storage, stem, ".rejected.parquet", parquet_bytes(table, compress=True), len(rows))
