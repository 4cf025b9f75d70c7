"""The quarantine of a run: every row of its corpus that is not in the index, in one Parquet file with file, row and reason.

Rows that broke the contract, ids that stand for several texts, and documents with a passage that the encoder can make no vector
of. It is written for people and holds the beginnings of texts: it inherits the corpus's classification, and gc takes it.
"""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.fingerprint import sha256
from pipeline.ingest.corpus import text_head
from pipeline.ingest.ingestion import REJECTED_SCHEMA
from pipeline.ingest.snapshot import parts, rejected_tables
from pipeline.root import layout
from pipeline.root.job import Job, scratch
from pipeline.root.manifest import SnapshotManifest
from pipeline.root.shards import Keys, fixed_binary, read_columns

FILE = "quarantine.parquet"
SOURCE = ("key", "doc_id", "source_uri", "source_row", "text")


def put_quarantine(job: Job, snapshot: SnapshotManifest, left_out: Keys | None = None) -> str:
    """Write it, with the passages of the keys ``left_out`` (sorted, (n,) S16) too; returns its URI.

    Holds the rejected rows of one ingest unit at a time.
    """
    path = layout.run(job.run_id, FILE)
    with scratch(job.scratch_parent) as folder:
        with pq.ParquetWriter(folder / FILE, REJECTED_SCHEMA, compression="zstd") as writer:
            for table in rejected_tables(job.storage, snapshot):
                writer.write_table(table.cast(REJECTED_SCHEMA))
            if left_out is not None and len(left_out):
                rows = list(_without_vector(job, snapshot, left_out))
                writer.write_table(pa.Table.from_pylist(rows, schema=REJECTED_SCHEMA))
        job.storage.adopt(path, folder / FILE)
    return job.storage.at(path)


def _without_vector(job: Job, snapshot: SnapshotManifest, left_out: Keys) -> Iterator[dict[str, object]]:
    """A row for every passage of the snapshot with one of the keys."""
    reasons = dict(_reasons(job))
    wanted = fixed_binary(left_out)
    for part in parts(job.storage, snapshot):
        keys = read_columns(job.storage, layout.PASSAGES, part.file, ["key"]).column("key")
        hits = set(pc.indices_nonzero(pc.is_in(keys, wanted)).to_pylist()) - set(part.masked.tolist())
        if hits:
            table = read_columns(job.storage, layout.PASSAGES, part.file, SOURCE)
            for row in table.take(pa.array(sorted(hits))).to_pylist():
                key, text = row.pop("key"), row.pop("text").encode()
                code, message = reasons[key]
                yield row | {"code": code, "message": message, "text_sha256": sha256(text), "text_head": text_head(text)}


def _reasons(job: Job) -> Iterator[tuple[bytes, tuple[str, str]]]:
    for record in job.embedding_records():
        if record.rejected:
            names = ("key", "code", "message")
            for row in read_columns(job.embeddings, job.embedding_folder, record.rejected, names).to_pylist():
                yield row["key"], (row["code"], row["message"])
