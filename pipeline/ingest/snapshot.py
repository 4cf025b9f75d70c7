"""The corpus at one moment: which ingest units it consists of, and which of their rows do not count.

A snapshot is named by what it is made from, so the same corpus has the same snapshot. In a corpus of ``mode: append`` the
units of earlier snapshots stay, oldest generation first.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.config import Config
from pipeline.config_what import CorpusConfig
from pipeline.errors import ConfigError, DataError, VerificationError
from pipeline.fingerprint import fingerprint
from pipeline.ingest.documents import FATES, Resolution
from pipeline.ingest.ingestion import COUNTS, REJECTED_SCHEMA
from pipeline.root import layout
from pipeline.root.manifest import ArtifactManifest, DataFile, InputFile, Record, SnapshotManifest, load, put_data, to_bytes
from pipeline.root.shards import KEY_DTYPE, Keys, keys_of, parquet_bytes, read_columns
from pipeline.root.storage import Storage

MASKED_SCHEMA = pa.schema([pa.field("part", pa.string(), nullable=False), pa.field("row", pa.int64(), nullable=False)])
SHOWN_REJECTED = 3


@dataclass(frozen=True)
class Part:
    """A part file of an ingest unit, and its rows that do not count, ascending."""

    file: DataFile
    masked: npt.NDArray[np.int64]

    @property
    def rows(self) -> int:
        """Passages that count."""
        return self.file.rows - len(self.masked)

    @property
    def kept(self) -> npt.NDArray[np.int64]:
        """Row numbers of the passages that count, ascending."""
        return np.delete(np.arange(self.file.rows), self.masked)


def snapshot_name(generations: Sequence[Sequence[str]], limit: int | None, deletes: str | None, mode: str) -> str:
    """Identity of a snapshot: the hash of its units and of what else decides which of their rows count."""
    units: list[Any] = [sorted(generation) for generation in generations]
    return fingerprint({"snapshot": 2, "units": units, "limit": limit, "deletes": deletes, "mode": mode})


def put_snapshot(
    storage: Storage, name: str, files: Sequence[InputFile], generations: Sequence[Sequence[Record]], found: Resolution,
    limit: int | None, read_by: str,
) -> SnapshotManifest:  # fmt: skip
    """Write the manifest over finished units, after the rows of them that do not count."""
    records = [record for generation in generations for record in generation]
    counts = {name: sum(record.counts.get(name, 0) for record in records) for name in COUNTS}
    counts |= {name: counts.get(name, 0) + count for name, count in found.counts.items()}
    settled = sum(counts.get(name, 0) for name in FATES)
    if counts["rows"] != settled:
        raise AssertionError(f"snapshot {name}: rows in {counts['rows']} != rows accounted for {settled}, {counts}")
    masked = rejected = None
    if found.masked:
        rows = [{"part": part, "row": row} for part in sorted(found.masked) for row in found.masked[part].tolist()]
        data = parquet_bytes(pa.Table.from_pylist(rows, schema=MASKED_SCHEMA), compress=True)
        masked = put_data(storage, f"{layout.SNAPSHOTS}/{name}", ".masked.parquet", data, len(rows))
    if found.conflicts:
        table = pa.Table.from_pylist([asdict(row) for row in found.conflicts], schema=REJECTED_SCHEMA)
        data = parquet_bytes(table, compress=True)
        rejected = put_data(storage, f"{layout.SNAPSHOTS}/{name}", ".rejected.parquet", data, len(found.conflicts))
    snapshot = SnapshotManifest(
        snapshot=name,
        files=tuple(files),
        generations=tuple(tuple(sorted(record.unit for record in generation)) for generation in generations),
        read_by=read_by,
        masked=masked,
        rejected=rejected,
        counts=counts,
        limit=limit,
    )
    storage.create(layout.snapshot(name), to_bytes(snapshot))
    return snapshot


def ceiling(corpus: CorpusConfig, rows: int) -> int:
    """So many of the rows, or passages, may be put aside."""
    return max(corpus.max_bad_rows, int(corpus.max_bad_fraction * rows))


def check_quality(storage: Storage, snapshot: SnapshotManifest, config: Config, quarantine: Callable[[], str]) -> None:
    """Raise DataError when more rows were rejected than the config accepts, or none is left; all of them are put aside first.

    ``quarantine`` does that and tells where.
    """
    counts, corpus = snapshot.counts, config.corpus
    rows, rejected = counts["rows"], counts["rejected"]
    most = ceiling(corpus, rows) if corpus.on_error != "abort" else 0
    if rejected > most:
        first = "; ".join(_shown(row) for row in rejected_rows(storage, snapshot, SHOWN_REJECTED))
        raise DataError(
            f"{corpus.uri}: {rejected} of {rows} rows rejected, the ceiling is {most}: {first}. All of them: "
            f"{quarantine()}; mend the rows or raise corpus.max_bad_fraction / max_bad_rows"
        )
    if not counts["documents"]:
        raise DataError(f"{corpus.uri}: no document in {rows} rows; check corpus.text and corpus.id")


def rejected_rows(storage: Storage, snapshot: SnapshotManifest, limit: int) -> list[dict[str, Any]]:
    """The first rejected rows of a snapshot."""
    rows: list[dict[str, Any]] = []
    for table in rejected_tables(storage, snapshot):
        rows += table.slice(0, limit - len(rows)).to_pylist()
        if len(rows) == limit:
            break
    return rows


def rejected_tables(storage: Storage, snapshot: SnapshotManifest) -> Iterator[Any]:
    """All rejected rows of a snapshot, a table per file of REJECTED_SCHEMA."""
    names = (*REJECTED_SCHEMA.names,)
    if snapshot.rejected:
        yield read_columns(storage, layout.SNAPSHOTS, snapshot.rejected, names)
    for record in chain.from_iterable(unit_records(storage, snapshot)):
        if record.rejected:
            yield read_columns(storage, layout.PASSAGES, record.rejected, names)


def unit_records(storage: Storage, snapshot: SnapshotManifest) -> Iterator[list[Record]]:
    """The records of a snapshot's units, a list per generation; raises VerificationError where one is gone."""
    for generation in snapshot.generations:
        records: list[Record] = []
        for unit in generation:
            record = load(Record, storage, layout.ingest_record(unit))
            if record is None:
                where = storage.at(layout.ingest_record(unit))
                raise VerificationError(f"{where}: gone, the snapshot names it; run ingest again")
            records.append(record)
        yield records


def parts(storage: Storage, snapshot: SnapshotManifest) -> list[Part]:
    """Every part of a snapshot, by unit; raises VerificationError when a record is gone or the rows do not add up."""
    masked: dict[str, npt.NDArray[np.int64]] = {}
    if snapshot.masked:
        table = read_columns(storage, layout.SNAPSHOTS, snapshot.masked, MASKED_SCHEMA.names)
        names, rows = table.column("part").combine_chunks().dictionary_encode(), table.column("row").to_numpy()
        places = names.indices.to_numpy()
        by_part = np.split(rows[np.argsort(places, kind="stable")], np.cumsum(np.bincount(places))[:-1])
        masked = {name: np.sort(own) for name, own in zip(names.dictionary.to_pylist(), by_part, strict=True)}
    none = np.empty(0, dtype=np.int64)
    records = chain.from_iterable(unit_records(storage, snapshot))
    found = [Part(file, masked.get(file.name, none)) for record in records for file in record.files]
    if (rows := sum(part.rows for part in found)) != snapshot.counts["passages"]:
        raise VerificationError(
            f"{storage.uri}: {rows} passages in snapshot {snapshot.snapshot}, it counts {snapshot.counts['passages']}"
        )
    return found


def part_keys(storage: Storage, part: Part) -> Keys:
    """Keys of the passages of a part that count, (n,) S16, ascending."""
    return np.delete(keys_of(read_columns(storage, layout.PASSAGES, part.file, ["key"]).column("key")), part.masked)


def live_keys(storage: Storage, snapshot_parts: Iterable[Part]) -> Keys:
    """Sorted distinct keys of a snapshot, (n,) S16: the ordinal of a passage is its place here."""
    keys = [part_keys(storage, part) for part in snapshot_parts]
    return np.unique(np.concatenate(keys)) if keys else np.empty(0, dtype=KEY_DTYPE)


def snapshot_of(storage: Storage, artifact: ArtifactManifest) -> SnapshotManifest:
    """The snapshot that an artifact was made from."""
    path = layout.snapshot(artifact.snapshot)
    snapshot = load(SnapshotManifest, storage, path)
    if snapshot is None:
        raise VerificationError(f"{storage.at(path)}: missing, artifact {artifact.version} names it; run vecmill reindex")
    return snapshot


def grown(
    chosen: Sequence[tuple[InputFile, str]], earlier: SnapshotManifest | None, read_by: str, uri: str
) -> tuple[list[tuple[InputFile, str]], tuple[tuple[str, ...], ...]]:
    """For a corpus that only grows: the files that no earlier generation has read, and those generations.

    A run with a limit has read less than all its files. Raises ConfigError when what was read before must be read in another
    way and is not there any more.
    """
    if earlier is None or earlier.limit is not None:
        return list(chosen), ()
    if earlier.read_by == read_by:
        known = {(file.uri, file.content) for file in earlier.files}
        return [(file, kind) for file, kind in chosen if (file.uri, file.content) not in known], earlier.generations
    here = {(file.uri, file.content) for file, _ in chosen}
    gone = [file.uri for file in earlier.files if (file.uri, file.content) not in here]
    if gone:
        raise ConfigError(
            f"{uri}: columns, passages or encoder changed, so that {gone[0]} must be read again and is not there as it was "
            f"({len(gone)} such files); put it back, undo the change, or start a new root"
        )
    return list(chosen), ()


def _shown(row: dict[str, Any]) -> str:
    where = row["source_uri"] if row["source_row"] is None else f"{row['source_uri']} row {row['source_row']}"
    return f"{where} {row['code']}, {row['message']}"
