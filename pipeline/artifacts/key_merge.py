"""The rows of an artifact in ordinal order: one pass over ranges of keys through every file, in bounded memory. No Ray here.

Ordinals are ranks of live keys. Snapshot parts and embedding shards are sorted by key, index shards have the rows of their
embedding shard; keys are hashes, so equal ranges of them hold about equally many passages and are a slice of each file. A
key that several embedding shards hold is taken from the one whose unit name is lowest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from pipeline.ann.index_plan import is_coded, standalone_bytes
from pipeline.ann.index_shard import open_codes
from pipeline.embed.embeddings import open_embeddings, vectors_of
from pipeline.errors import ConfigError, VerificationError
from pipeline.ingest.ingestion import PASSAGE_SCHEMA
from pipeline.ingest.snapshot import Part
from pipeline.root import layout
from pipeline.root.job import Job
from pipeline.root.manifest import DataFile, DocumentsFile, Record, TrainedManifest
from pipeline.root.shards import AHEAD_BYTES, ROW_GROUP_ROWS, Cursor, Keys, is_among, key_bounds, keys_of, to_rows
from pipeline.root.storage import Storage
from pipeline.search.document_files import SCHEMA, DocumentsWriter

RANGE_PASSAGES = 1 << 12
ROWS_PER_SHARD = 1 << 6
"""Passages per range: at least so many for each shard, so that steps of Python do not grow with passages times shards."""
LIBRARY_BYTES = 128 << 20
"""Memory that Arrow, its reader and its writer take and keep however little they are given (measured: 60 to 100 MB)."""
MORE_AHEAD_BYTES = 32 << 20
"""Where memory is left for it: the fewer requests, the less is waited for them."""
RANGE_COPIES = 4
"""Bytes of memory per byte of a range: what the files give, what is chosen, what is written."""

DOCUMENT_COLUMNS = [name for name in PASSAGE_SCHEMA.names if name != "tokens"]


@dataclass(frozen=True)
class Sources:
    """What is merged: snapshot parts less some keys, every shard of the embedding store, codes of a trained index or none."""

    job: Job
    parts: Sequence[Part]
    left_out: Keys
    shards: Sequence[Record]
    trained: TrainedManifest

    @property
    def has_codes(self) -> bool:
        """Whether there are index shards; a flat or factory index is made from vectors."""
        return is_coded(self.trained.kind)

    @property
    def code_size(self) -> int:
        """Bytes of a row of an index shard."""
        made = self.trained
        return standalone_bytes(made.kind, made.dim, made.m, made.nbits, made.nlist) if self.has_codes else 0


@dataclass
class _Shard:
    """An embedding shard and its codes, read forward together. ``duplicates``: live vectors that another shard gave."""

    record: Record
    vectors: Cursor
    codes: Cursor | None
    taken: int = 0
    duplicates: int = 0

    def fill(self, bound: bytes | None, live: Keys, missing: Any, vectors: Any, codes: Any) -> None:
        """Put this shard's rows below ``bound`` in their places among ``live`` where they are still missing."""
        table = pa.concat_tables(self.vectors.take_until(bound))
        keys = keys_of(table.column("key"))
        code_table = pa.concat_tables(self.codes.take(len(keys))) if self.codes else None
        if not len(keys) or not len(live) or (codes is not None and code_table is None):
            return  # of a shard that has no codes: another root wrote it into a shared store since they were made
        places = np.searchsorted(live, keys).clip(max=len(live) - 1)
        is_live = live[places] == keys
        rows = np.flatnonzero(is_live & missing[places])
        self.duplicates += int(is_live.sum()) - len(rows)
        if not len(rows):
            return
        vectors[places[rows]] = vectors_of(table.column("embedding"), vectors.shape[1])[rows]
        if codes is not None and code_table is not None:
            codes[places[rows]] = to_rows(code_table.column("code"), np.uint8).reshape(len(keys), -1)[rows]
        missing[places[rows]] = False
        self.taken += len(rows)


@dataclass
class Counts:
    """What a pass has read and written; ``records`` are the shards that a live passage was taken from."""

    passages: int = 0
    document_rows: int = 0
    rows: int = 0
    duplicate_vectors: int = 0
    records: dict[str, str] = field(default_factory=dict)
    documents: list[DocumentsFile] = field(default_factory=list)


def merge_rows(sources: Sources, vectors: Path, folder: Path, codes: Path) -> Counts:
    """Write vectors (n, dim) float16, codes (n, code size) where there are any, and documents in ``folder``, by ordinal.

    Raises VerificationError when a live passage has no vector or code, ConfigError when the files are too many for
    ``compute.merge_memory``.
    """
    job, dim = sources.job, sources.trained.dim
    counts = Counts(rows=sum(part.rows for part in sources.parts))
    passages = max(RANGE_PASSAGES, ROWS_PER_SHARD * len(sources.shards))
    ahead = _ahead_bytes(sources, min(passages, counts.rows))
    texts = [Cursor(job.storage, layout.PASSAGES, part.file, DOCUMENT_COLUMNS, part.masked, ahead) for part in sources.parts]
    shards = [_open(sources, record, ahead) for record in sorted(sources.shards, key=lambda record: record.unit)]
    with DocumentsWriter(folder, counts.rows) as writer, vectors.open("wb") as vectors_out, codes.open("wb") as codes_out:
        for bound in key_bounds(counts.rows, passages):
            table = pa.concat_tables([piece for cursor in texts for piece in cursor.take_until(bound)])
            keys = keys_of(table.column("key"))
            live = np.unique(keys)
            live = live[~is_among(live, sources.left_out)]
            _write_documents(writer, table, keys, live, counts.passages)
            found = np.empty((len(live), dim), dtype=np.float16)
            coded = np.empty((len(live), sources.code_size), dtype=np.uint8) if sources.has_codes else None
            missing = np.ones(len(live), dtype=bool)
            for shard in shards:
                shard.fill(bound, live, missing, found, coded)
            if missing.any():
                lack = "no vector, or no code of it" if sources.has_codes else "no vector"
                where = job.embeddings.at(job.embedding_folder)
                raise VerificationError(f"{where}: {int(missing.sum())} of {len(live)} passages have {lack}; run again")
            _put(vectors_out, found)
            if coded is not None:
                _put(codes_out, coded)
            counts.passages += len(live)
    counts.documents, counts.document_rows = writer.files, writer.rows
    counts.records = {shard.record.unit: shard.record.files[0].sha256 for shard in shards if shard.taken}
    counts.duplicate_vectors = sum(shard.duplicates for shard in shards)
    return counts


def _open(sources: Sources, record: Record, ahead: int) -> _Shard:
    job = sources.job
    vectors = open_embeddings(job.embeddings, job.embedding_folder, record, sources.trained.dim, ahead)
    codes = open_codes(job.storage, sources.trained, record, sources.code_size, ahead) if sources.has_codes else None
    return _Shard(record, vectors, codes)


def _write_documents(writer: DocumentsWriter, table: Any, keys: Keys, live: Keys, first: int) -> None:
    """Write the rows of live keys, ordinals counted from ``first``; equal texts follow each other by doc_id."""
    is_live = is_among(keys, live)
    found = table.filter(pa.array(is_live)).drop_columns(["key"])
    ordinals = pa.array(first + np.searchsorted(live, keys[is_live]))
    writer.write(found.add_column(0, SCHEMA.field("ordinal"), ordinals))


def _put(file: BinaryIO, rows: Any) -> None:
    file.write(memoryview(rows).cast("B") if rows.size else b"")


def _ahead_bytes(sources: Sources, passages: int) -> int:
    """What each remote file may read ahead; one row group of every file and one range are in memory, too.

    Raises ConfigError where ``compute.merge_memory`` does not hold the least of it.
    """
    job, shards = sources.job, [shard.files[0] for shard in sources.shards]
    count = len(sources.parts) + len(shards) * (1 + sources.has_codes)
    groups = sum(_open_bytes(job.storage, _group_bytes(part.file)) for part in sources.parts)
    groups += sum(_open_bytes(job.embeddings, _group_bytes(file)) for file in shards)
    groups += len(shards) * _open_bytes(job.storage, ROW_GROUP_ROWS * sources.code_size) if sources.has_codes else 0
    text = sum(part.file.size_bytes for part in sources.parts) // max(1, sum(part.file.rows for part in sources.parts))
    entry = 2 * sources.trained.dim + sources.code_size + text
    needed = LIBRARY_BYTES + groups + RANGE_COPIES * passages * entry
    limit = job.config.compute.merge_memory
    if needed > limit:
        raise ConfigError(
            f"compute.merge_memory: {limit} bytes, merging {count} files needs at least {needed}; give it more, or make "
            "fewer shards with compute.unit_passages"
        )
    return AHEAD_BYTES + min(MORE_AHEAD_BYTES, (limit - needed) // 2 // max(1, count))


def _group_bytes(file: DataFile) -> int:
    return file.size_bytes * min(ROW_GROUP_ROWS, file.rows) // max(1, file.rows)


def _open_bytes(storage: Storage, group_bytes: int) -> int:
    """Memory of a file that is read forward: a row group, of a remote one also the bytes that it came from and those ahead."""
    return group_bytes if storage.is_local else 2 * group_bytes + AHEAD_BYTES
