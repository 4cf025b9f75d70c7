"""Erasure: the text and the vectors of documents leave everything under a root, and that is proved.

What a document left behind when it went out of the corpus: its rows in ingest units (hidden by ``corpus.deletes`` or rejected),
earlier artifacts and snapshots, the vectors and codes of its passages. Objects that a versioned bucket keeps, copies in
``search.cache_dir`` of any machine, training pairs, models trained on them and the corpus itself are beyond this.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.artifacts import publish
from pipeline.config import Config
from pipeline.errors import ConfigError, VerificationError
from pipeline.ingest.documents import FATES, count_passages, deleted_keys
from pipeline.ingest.ingestion import DOCUMENT_SCHEMA, PASSAGE_SCHEMA, REJECTED_SCHEMA
from pipeline.ingest.snapshot import MASKED_SCHEMA, live_keys, parts, snapshot_of, unit_records
from pipeline.operations import upkeep
from pipeline.operations.compaction import Store
from pipeline.root import layout
from pipeline.root.job import embedding_store, new_run_id
from pipeline.root.journal import RunState
from pipeline.root.log import Lease, writing
from pipeline.root.manifest import DataFile, Record, SnapshotManifest, list_records, load, put_data, to_bytes
from pipeline.root.result import RunResult
from pipeline.root.shards import KEY_DTYPE, Keys, is_among, keys_of, parquet_bytes, read_columns
from pipeline.root.storage import Storage, Stored
from pipeline.search.document_files import walked


@dataclass(frozen=True)
class Erased:
    """What went: rows of ingest units, vectors, files that nothing needs; and how many files were searched afterwards."""

    passages: int
    rejected: int
    vectors: int
    files: int
    searched: int


def purge(config: Config, doc_ids: Collection[str], say: Callable[[str], None] = lambda _: None) -> Erased:
    """Erase documents that are out of the live artifact. Earlier artifacts go with them: there is no rollback any more.

    Raises ConfigError while one of them is live, VerificationError when something of one is found at the end. It may be run
    again, also after it was killed.
    """
    storage = Storage(config.root, config.store)
    shared = embedding_store(storage, config)
    ids, id_keys = pa.array(sorted(set(doc_ids)), pa.string()), deleted_keys(doc_ids)
    with writing(storage, new_run_id(), config.compute.lease_ttl_s, say) as lease:
        snapshot = snapshot_of(storage, publish.require_live(storage))
        _check_gone(storage, snapshot, ids)
        keys = _passage_keys(storage, ids)
        keys = keys[~is_among(keys, live_keys(storage, parts(storage, snapshot)))]  # other documents may say the same
        vectors = sum(_erase_vectors(Store(storage, shared, encoder), keys, lease) for encoder in _encoders(shared))
        passages, rejected = _erase_rows(storage, snapshot, ids, id_keys, lease)
        gone = upkeep.collect_held(storage, config, keep=1, grace_s=-math.inf, lease=lease)
        _erase_told(storage, doc_ids, lease)
    searched = _search(storage, storage.walk(), ids, id_keys, keys)
    searched += _search(shared, shared.walk(), ids, id_keys, keys) if config.store.embeddings else 0
    return Erased(passages, rejected, vectors, sum(gone.files.values()), searched)


def _check_gone(storage: Storage, snapshot: SnapshotManifest, ids: Any) -> None:
    """Raise ConfigError where one of the documents counts in the snapshot, or would if its id were not ambiguous."""
    found = [
        (row["doc_id"], row["source_uri"])
        for part in parts(storage, snapshot)
        for row in _rows(storage, part.file, ids, hidden=part.masked)
    ]
    if snapshot.rejected:
        rejected = read_columns(storage, layout.SNAPSHOTS, snapshot.rejected, ["doc_id", "source_uri"])
        found += [(row["doc_id"], row["source_uri"]) for row in rejected.filter(pc.is_in(rejected["doc_id"], ids)).to_pylist()]
    if found:
        doc_id, uri = found[0]
        raise ConfigError(
            f"{storage.uri}: document {doc_id!r} of {uri} is in the corpus of the live artifact; take it out of the corpus or "
            "list it in corpus.deletes, run vecmill reindex, then purge"
        )


def _rows(storage: Storage, file: DataFile, ids: Any, hidden: Any) -> list[dict[str, Any]]:
    """Document and source of the rows of a part that are of one of the documents and not hidden."""
    table = read_columns(storage, layout.PASSAGES, file, ["doc_id", "source_uri"])
    hits = np.setdiff1d(np.flatnonzero(_is_of(table, ids)), hidden)
    return list(table.take(pa.array(hits)).to_pylist())


def _is_of(table: Any, ids: Any) -> Any:
    return pc.is_in(table.column("doc_id"), ids).to_numpy(zero_copy_only=False)


def _passage_keys(storage: Storage, ids: Any) -> Keys:
    """Sorted keys of the passages of the documents in every ingest unit of the root, of whatever snapshot."""
    found = [np.empty(0, dtype=KEY_DTYPE)]
    for record in list_records(storage, layout.PASSAGES).values():
        for file in record.files:
            table = read_columns(storage, layout.PASSAGES, file, ["key", "doc_id"])
            found.append(keys_of(table.column("key"))[_is_of(table, ids)])
    return np.unique(np.concatenate(found))


def _encoders(embeddings: Storage) -> list[str]:
    return sorted({file.path.partition("/")[0] for file in embeddings.walk() if "/" in file.path})


def _erase_vectors(store: Store, keys: Keys, lease: Lease) -> int:
    """Write every shard anew, with its index shards, that has one of the keys; returns how many vectors went."""
    count = 0
    for record in store.records():
        shard = store.without(record, keys)
        if not (shard.kept.all() and shard.kept_rejected.all()):
            count += int((~shard.kept).sum())
            store.rewrite([shard], lease)
    return count


def _erase_rows(storage: Storage, snapshot: SnapshotManifest, ids: Any, id_keys: Keys, lease: Lease) -> tuple[int, int]:
    """Write every ingest unit of the snapshot anew that has rows of the documents: passages and rejected rows that went.

    All those passages are masked. New files come first, then the mask of old and new files, then the records: whichever of
    the two a reader finds, the mask fits.
    """
    masked = {part.file.name: part.masked for part in parts(storage, snapshot)}
    records = list(chain.from_iterable(unit_records(storage, snapshot)))
    changed: list[Record] = []
    for record in records:
        without = _without(storage, record, ids, id_keys, masked)
        changed += [without] if without != record else []
    if changed:
        fresh = {record.unit: record for record in [*records, *changed]}
        lease.check()
        _put_snapshot(storage, snapshot, list(fresh.values()), masked)
        for record in changed:
            lease.check()
            storage.put(layout.ingest_record(record.unit), to_bytes(record))
    old = {record.unit: record for record in records}
    pairs = [(old[record.unit].counts, record.counts) for record in changed]
    passages, rejected = (sum(before[name] - after[name] for before, after in pairs) for name in ("passages", "rejected"))
    return passages, rejected


def _without(storage: Storage, record: Record, ids: Any, id_keys: Keys, masked: dict[str, Any]) -> Record:
    """A unit's record over files without the documents, which are written; ``masked`` gets the rows of the new parts."""
    stem, counts = f"{layout.PASSAGES}/{record.unit}", dict(record.counts)
    files: list[DataFile] = []
    for file in record.files:
        table = read_columns(storage, layout.PASSAGES, file, PASSAGE_SCHEMA.names)
        gone = _is_of(table, ids)
        if not gone.any():
            files.append(file)
            continue
        count_passages(counts, table.filter(pa.array(gone)))
        data = parquet_bytes(table.filter(pa.array(~gone)), compress=True)
        files.append(put_data(storage, stem, ".parquet", data, int((~gone).sum())))
        hidden = np.zeros(len(gone), dtype=bool)
        hidden[masked[file.name]] = True
        masked[files[-1].name] = np.flatnonzero(hidden[~gone])
    documents, rejected = record.documents, record.rejected
    if documents:
        table = read_columns(storage, layout.PASSAGES, documents, DOCUMENT_SCHEMA.names)
        gone = is_among(keys_of(table.column("document")), id_keys)
        if gone.any():
            data = parquet_bytes(table.filter(pa.array(~gone)), compress=True)
            documents = put_data(storage, stem, ".documents.parquet", data, int((~gone).sum()))
            counts |= {name: counts[name] - int(gone.sum()) for name in ("rows", "documents")}
    if rejected:
        table = read_columns(storage, layout.PASSAGES, rejected, REJECTED_SCHEMA.names)
        gone = _is_of(table, ids)
        if gone.any():
            data = parquet_bytes(table.filter(pa.array(~gone)), compress=True)
            rejected = put_data(storage, stem, ".rejected.parquet", data, int((~gone).sum()))
            counts |= {name: counts[name] - int(gone.sum()) for name in ("rows", "rejected")}
    return record.model_copy(update={"files": tuple(files), "documents": documents, "rejected": rejected, "counts": counts})


def _erase_told(storage: Storage, doc_ids: Collection[str], lease: Lease) -> None:
    """Erase what runs said that may name one of the documents; how they ended, and what they measured, stays.

    An error begins with the first rejected rows, and is cut off somewhere, so every one goes.
    """
    for file in storage.walk(layout.RUNS):
        lease.check()
        if file.path.endswith("/result.json"):
            result = load(RunResult, storage, file.path)
            if result and result.error:
                storage.put(file.path, to_bytes(result.model_copy(update={"error": None})))
        elif fnmatch(file.path, layout.events("*") + "/*.json") and (state := load(RunState, storage, file.path)):
            told = [state.why, *(stage.message for stage in state.stages)]
            if any(doc_id in text for doc_id in doc_ids for text in told):
                storage.delete(file.path)


def _put_snapshot(storage: Storage, snapshot: SnapshotManifest, records: list[Record], masked: dict[str, Any]) -> None:
    """The same snapshot of smaller units: what went was counted as deleted or rejected."""
    rows = [{"part": part, "row": row} for part in sorted(masked) for row in masked[part].tolist()]
    file = None
    if rows:
        data = parquet_bytes(pa.Table.from_pylist(rows, schema=MASKED_SCHEMA), compress=True)
        file = put_data(storage, f"{layout.SNAPSHOTS}/{snapshot.snapshot}", ".masked.parquet", data, len(rows))
    counts = snapshot.counts | {"rows": sum(record.counts["rows"] for record in records)}
    conflicts = snapshot.rejected.rows if snapshot.rejected else 0
    counts["rejected"] = sum(record.counts["rejected"] for record in records) + conflicts
    if "deleted" in counts:
        settled = (counts.get(name, 0) for name in FATES if name != "deleted")
        counts["deleted"] = counts["rows"] - sum(settled)
    storage.put(layout.snapshot(snapshot.snapshot), to_bytes(snapshot.model_copy(update={"masked": file, "counts": counts})))


def _search(storage: Storage, files: Iterable[Stored], ids: Any, id_keys: Keys, keys: Keys) -> int:
    """Look for the documents in every file of rows; returns how many those are. Raises VerificationError when one is found."""
    searched = 0
    for file in files:
        if not file.path.endswith((".parquet", ".arrow")):
            continue
        with storage.open(file.path) as handle:
            for batch in _identities(handle, is_parquet=file.path.endswith(".parquet")):
                found = "doc_id" in batch.schema.names and _is_of(batch, ids).any()
                for name, wanted in (("document", id_keys), ("key", keys)):
                    found = found or (name in batch.schema.names and is_among(keys_of(batch.column(name)), wanted).any())
                if found:
                    raise VerificationError(f"{storage.at(file.path)}: still has something of the documents; purge again")
        searched += 1
    return searched


def _identities(handle: Any, is_parquet: bool) -> Iterator[Any]:
    """The columns of a file that say whose its rows are, some rows at a time."""
    columns = ("doc_id", "document", "key")
    if not is_parquet:
        yield from walked(handle, columns)
        return
    with pq.ParquetFile(handle) as parquet:
        names = [name for name in columns if name in parquet.schema_arrow.names]
        yield from parquet.iter_batches(columns=names) if names else ()
