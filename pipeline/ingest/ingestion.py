"""One ingest unit read, checked, split and stored.

Rows of a part are sorted by key; beside the parts lies a row per document: who it is and what it says. Rows in = documents +
rejected rows, and the record comes last.
"""

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Config
from pipeline.errors import BadFileError, StorageError, VerificationError
from pipeline.ingest.corpus import RejectedRow, SourceDocument, read_documents, rejected_document
from pipeline.ingest.passages import Passage, Splitter, passage_key
from pipeline.ingest.slices import Slice
from pipeline.ingest.units import IngestUnit
from pipeline.root import layout
from pipeline.root.manifest import DataFile, Record, load, put_data, put_record
from pipeline.root.shards import KEY_BYTES, KEY_DTYPE, fixed_binary, parquet_bytes, read_columns
from pipeline.root.storage import Storage

BATCH_DOCUMENTS = 256
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
COUNTS = ("rows", "documents", "rejected", "skipped_files", "passages", "split", "truncated", "sparse", "prompted", "tokens")
MAX_KNOWN = 1 << 20
"""Passages of earlier units that an ingest task keeps the token counts of: some 150 MB."""
CRASHED = "E_CRASH"
CRASH_HINT = "look at it and at the memory of the machine"

Split = Callable[[Sequence[str]], list[list[Passage]]]
Place = tuple[str, int | None]
"""URI and row of a document; no row: of the whole file."""


@dataclass
class _Draft:
    """What a unit has given so far. ``bad``: the slices that are skipped because they cannot be read.

    ``prompt``: what the encoder puts before each text; documents that begin with it already are counted.
    """

    storage: Storage
    stem: str
    bad: dict[Slice, BadFileError] = field(default_factory=dict)
    prompt: str = ""
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
        self.counts["prompted"] += bool(self.prompt) and document.text.startswith(self.prompt)
        self.counts["sparse"] += len(document.text) > SPARSE_CHARS and len(document.text) > SPARSE_RATIO * tokens
        where = (document.source_uri, document.source_row)
        self.documents.append((passage_key(document.doc_id), passage_key(document.text), *where))
        source = dict(zip(("source_uri", "source_row", "metadata"), (*where, document.metadata), strict=True))
        self.buffer += [
            {"doc_id": document.doc_id, "passage": number, **vars(each), **source} for number, each in enumerate(passages)
        ]
        self.chars += len(document.text)
        if len(self.buffer) >= PART_PASSAGES or self.chars >= PART_CHARS:
            self.flush()

    def reject(self, row: RejectedRow) -> None:
        """Put a row aside."""
        self.counts["rejected"] += 1
        self.rejected.append(row)

    def flush(self) -> None:
        """Store what is waiting as a part, sorted by key."""
        if self.buffer:
            self.buffer.sort(key=lambda row: (row["key"], row["doc_id"], row["passage"]))
            data = parquet_bytes(pa.Table.from_pylist(self.buffer, schema=PASSAGE_SCHEMA), compress=True)
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


def ingest_unit(
    unit: IngestUnit, config: Config, splitter: Splitter, storage: Storage, deadly: Collection[Place] = frozenset()
) -> Record:
    """Read, check, split and store the rows of one unit; the record is created last. ``deadly``: rows that are rejected unseen.

    Raises BadFileError on a file that cannot be read, unless ``corpus.on_error`` says to skip it.
    """
    started = time.perf_counter()
    draft = _Draft(storage, f"{layout.PASSAGES}/{unit.name}", prompt=splitter.prompt)
    split = partial(splitter, known=_counted_before(storage, unit.before))
    while not _is_read(unit, config, split, draft, deadly):
        draft = _Draft(storage, draft.stem, draft.bad, draft.prompt)  # what a bad file gave before it broke is not kept
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


def document_places(part: Slice, config: Config) -> list[Place]:
    """Where the documents of a slice are, which is read and not split."""
    rows = read_documents(part, config.corpus, config.store)
    return [(row.source_uri, row.source_row) for row in rows if isinstance(row, SourceDocument)]


def split_documents(unit: IngestUnit, config: Config, splitter: Splitter, wanted: Collection[Place]) -> None:
    """Split these documents of a unit and forget them: whether a process outlives it is the question."""
    for part in unit.slices:
        if any(uri == part.uri for uri, _ in wanted):
            for row in read_documents(part, config.corpus, config.store):
                if isinstance(row, SourceDocument) and (row.source_uri, row.source_row) in wanted:
                    splitter([row.text])


def _counted_before(storage: Storage, units: Collection[str]) -> dict[bytes, int]:
    """Tokens of the passages of earlier units by key, but for those that were cut. It only saves work: what is gone is none."""
    found: dict[bytes, int] = {}
    with contextlib.suppress(VerificationError, StorageError, FileNotFoundError):
        for record in (load(Record, storage, layout.ingest_record(unit)) for unit in units):
            for file in record.files if record else ():
                if len(found) > MAX_KNOWN:
                    return found
                table = read_columns(storage, layout.PASSAGES, file, ["key", "tokens", "truncated"])
                table = table.filter(pc.invert(table.column("truncated")))
                found |= zip(table.column("key").to_pylist(), table.column("tokens").to_pylist(), strict=True)
    return found


def _is_read(unit: IngestUnit, config: Config, split: Split, draft: _Draft, deadly: Collection[Place]) -> bool:
    """Read the slices of a unit that are not bad; False when another one turned out to be, and is now among them."""
    for part in unit.slices:
        if part in draft.bad:
            continue
        try:
            if (part.uri, None) in deadly:
                raise BadFileError(f"{part.uri}: {CRASHED}, the process that read it died twice; {CRASH_HINT}")
            documents = _documents(part, unit.limit, config, draft, deadly)
            for batch in _batches(documents, BATCH_DOCUMENTS):
                for document, passages in zip(batch, split([each.text for each in batch]), strict=True):
                    draft.add(document, passages)
        except BadFileError as error:
            if config.corpus.on_error != "skip_file":
                raise
            draft.bad[part] = error
            return False
    draft.flush()
    return True


def _documents(
    part: Slice, limit: int | None, config: Config, draft: _Draft, deadly: Collection[Place]
) -> Iterator[SourceDocument]:
    """The good rows of a slice, up to the unit's limit; the others are put aside."""
    for row in read_documents(part, config.corpus, config.store):
        if limit is not None and draft.taken >= limit:
            return
        draft.counts["rows"] += 1
        if isinstance(row, RejectedRow):
            draft.reject(row)
        elif (row.source_uri, row.source_row) in deadly:
            draft.reject(rejected_document(row, CRASHED, f"the process that split it alone died twice; {CRASH_HINT}"))
        else:
            draft.taken += 1
            yield row


def _batches(documents: Iterator[SourceDocument], size: int) -> Iterator[list[SourceDocument]]:
    while batch := list(islice(documents, size)):
        yield batch
