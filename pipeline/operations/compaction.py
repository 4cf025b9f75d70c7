"""Embedding shards written anew, with their index shards: tiny ones become one, rows that nothing needs go.

A new shard is there before the old ones go, and a key in two of them is taken from one, so a run that ends in between leaves
nothing wrong behind.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.ann.index_shard import put_codes
from pipeline.embed.embeddings import REJECTED_SCHEMA, put_embeddings, vectors_of
from pipeline.fingerprint import sha256
from pipeline.root import layout
from pipeline.root.log import Lease
from pipeline.root.manifest import Record, TrainedManifest, list_records, load
from pipeline.root.shards import KEY_DTYPE, ROW_GROUP_ROWS, Keys, is_among, keys_of, read_columns, read_keys, to_rows
from pipeline.root.storage import Storage

SMALL_ROWS = ROW_GROUP_ROWS
TARGET_ROWS = 1 << 15
MAX_DEAD = 0.5
"""Share of a shard's rows above which it is written anew."""

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Shard:
    """An embedding shard and which of its rows, and of its quarantined passages, are to stay."""

    record: Record
    kept: Mask
    kept_rejected: Mask


@dataclass(frozen=True)
class Store:
    """Shards of one encoder: in the embedding store, and their index shards under the root."""

    root: Storage
    embeddings: Storage
    encoder: str

    def records(self) -> list[Record]:
        """Records of the embedding shards, by unit name."""
        return list(list_records(self.embeddings, self.encoder).values())

    def read_shard(self, record: Record, keep: Keys, claimed: Mask) -> Shard:
        """A shard whose rows stay that are in ``keep`` (sorted) and that no shard before has ``claimed``, which it marks."""
        keys = read_keys(self.embeddings, self.encoder, record.files[0])
        kept = is_among(keys, keep)
        places = np.searchsorted(keep, keys[kept])
        kept[kept] = ~claimed[places]
        claimed[places] = True
        return Shard(record, kept, is_among(self._rejected(record), keep))

    def without(self, record: Record, erased: Keys) -> Shard:
        """A shard whose rows stay but for those ``erased`` (sorted)."""
        keys = read_keys(self.embeddings, self.encoder, record.files[0])
        return Shard(record, ~is_among(keys, erased), ~is_among(self._rejected(record), erased))

    def rewrite(self, shards: Sequence[Shard], lease: Lease) -> Record | None:
        """One shard of the rows that stay, made from several that go; None where no row stays.

        Raises LockedError, and deletes none, where another writer has taken the root.
        """
        lease.check()
        tables = [read_columns(self.embeddings, self.encoder, shard.record.files[0], ["key", "embedding"]) for shard in shards]
        kept = np.concatenate([shard.kept for shard in shards])
        table = pa.concat_tables(tables)
        dim = table.schema.field("embedding").type.byte_width // 2
        keys, vectors = keys_of(table.column("key"))[kept], vectors_of(table.column("embedding"), dim)[kept]
        failed_keys, reasons = self._failures(shards)
        every = np.concatenate([keys, failed_keys])
        record = None
        if len(every):
            order = np.argsort(every, kind="stable")
            padded = np.concatenate([vectors.astype(np.float32), np.full((len(failed_keys), dim), np.nan, dtype=np.float32)])
            failed = {row: reasons[number - len(keys)] for row, number in enumerate(order.tolist()) if number >= len(keys)}
            counts = {"tokens": sum(shard.record.counts.get("tokens", 0) for shard in shards)}
            draft = Record(unit=sha256(every[order].tobytes())[:20], files=(), counts=counts)
            record = put_embeddings(self.embeddings, self.encoder, every[order], padded[order], failed, draft)
            self._put_codes(shards, np.argsort(keys, kind="stable"), record.unit)
        lease.check()
        for shard in shards:
            if record is None or shard.record.unit != record.unit:
                self._delete(shard.record)
        return record

    def _failures(self, shards: Sequence[Shard]) -> tuple[Keys, list[str]]:
        keys, reasons = [np.empty(0, dtype=KEY_DTYPE)], []
        for shard in shards:
            if shard.record.rejected:
                table = read_columns(self.embeddings, self.encoder, shard.record.rejected, REJECTED_SCHEMA.names)
                keys.append(keys_of(table.column("key"))[shard.kept_rejected])
                rows = zip(table.column("code").to_pylist(), table.column("message").to_pylist(), strict=True)
                reasons += [f"{code}: {text}" for (code, text), kept in zip(rows, shard.kept_rejected, strict=True) if kept]
        return np.concatenate(keys), reasons

    def _rejected(self, record: Record) -> Keys:
        return read_keys(self.embeddings, self.encoder, record.rejected) if record.rejected else np.empty(0, dtype=KEY_DTYPE)

    def _put_codes(self, shards: Sequence[Shard], order: npt.NDArray[np.int64], unit: str) -> None:
        """The same rows of the index shards, for every trained index that has all of them; others are added when needed."""
        for trained in self._trained():
            folder = layout.index_shards(trained.trained)
            records = [load(Record, self.root, f"{folder}/{shard.record.unit}.json") for shard in shards]
            tables = [read_columns(self.root, folder, record.files[0], ["code"]) for record in records if record is not None]
            if len(tables) == len(shards):
                kept = np.concatenate([shard.kept for shard in shards])
                codes = to_rows(pa.concat_tables(tables).column("code"), np.uint8).reshape(len(kept), -1)[kept]
                put_codes(self.root, trained, unit, codes[order])

    def _trained(self) -> Iterator[TrainedManifest]:
        for folder in self.root.list("trained"):
            manifest = load(TrainedManifest, self.root, f"{folder}/manifest.json")
            if manifest and manifest.encoder == self.encoder:
                yield manifest

    def _delete(self, record: Record) -> None:
        """Records first: what a killed run leaves of the data, gc finds."""
        _delete(self.embeddings, self.encoder, record)
        for folder in self.root.list("shards"):
            codes = load(Record, self.root, f"{folder}/{record.unit}.json")
            if codes is not None:
                _delete(self.root, folder, codes)


def plan(store: Store, live: Keys, records: Sequence[Record]) -> list[list[Shard]]:
    """Groups of shards to make one of each: tiny ones, and those with more dead rows than live. ``live``: sorted keys."""
    claimed = np.zeros(len(live), dtype=bool)
    groups: list[list[Shard]] = []
    group: list[Shard] = []
    rows = 0
    for record in sorted(records, key=lambda record: (-record.files[0].rows, record.unit)):  # a key in two stays in the larger
        shard = store.read_shard(record, live, claimed)
        count = int(shard.kept.sum())
        if count >= SMALL_ROWS and count >= (1 - MAX_DEAD) * len(shard.kept):
            continue
        if group and rows + count > TARGET_ROWS:
            groups.append(group)
            group, rows = [], 0
        group.append(shard)
        rows += count
    return [group for group in [*groups, group] if len(group) > 1 or any(not shard.kept.all() for shard in group)]


def _delete(storage: Storage, folder: str, record: Record) -> None:
    storage.delete(f"{folder}/{record.unit}.json")
    for file in (*record.files, record.rejected):
        if file is not None:
            storage.delete(f"{folder}/{file.name}")
