"""The embedding store: which passages it lacks, and shards of (key, float16 vector) sorted by key.

One store per encoder fingerprint, shared by all snapshots and runs: a text is encoded once. A unit is named
by the hash of its keys, so the same work has the same name wherever and whenever it is done. A passage that the
encoder can make no vector of is in the quarantine of its unit: vectors + quarantined = passages.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from pipeline.errors import EncoderError, VerificationError
from pipeline.fingerprint import sha256
from pipeline.ingest.passages import CONTEXT_BYTES
from pipeline.root.manifest import DataFile, Record, put_data, put_record
from pipeline.root.shards import (
    KEY_BYTES,
    KEY_DTYPE,
    Cursor,
    Keys,
    fixed_binary,
    is_among,
    parquet_bytes,
    read_keys,
    to_rows,
)
from pipeline.root.storage import Storage

ENCODER = b"vecmill.encoder"
MAX_UNIT_PASSAGES = {"cpu": 4096, "gpu": 32768}
"""A unit is what a crash repeats: some ten seconds of work."""
Half = npt.NDArray[np.float16]
REJECTED_SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(KEY_BYTES), nullable=False),
        pa.field("code", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
    ]
)


class Pick(BaseModel):
    """Rows of one snapshot part, as runs (first, end)."""

    model_config = ConfigDict(frozen=True)
    file: DataFile
    runs: tuple[tuple[int, int], ...]


Rows = tuple[DataFile, Keys, npt.NDArray[np.int64]]
"""Some passages of a snapshot part: its file, their keys and row numbers, both ascending."""


class EmbedUnit(BaseModel):
    """Passages to encode together: rows of snapshot parts, one occurrence of each key. ``late``: contexts are read whole."""

    model_config = ConfigDict(frozen=True)
    name: str
    picks: tuple[Pick, ...]
    passages: int
    late: bool = False


def plan_embedding(missing: Iterable[Rows], size: int, *, late: bool = False) -> list[EmbedUnit]:
    """Units of ``size`` passages, the last of the rest, each key once, in part order; one part is in memory at a time.

    ``late``: passages that are read together are in one unit, which may be larger for them.
    """
    units: list[EmbedUnit] = []
    taken: list[Rows] = []
    room = size
    for file, keys, rows in missing:
        contexts = contexts_of(keys) if late else None
        start = 0
        while start < len(rows):
            end = min(start + room, len(rows))
            if contexts is not None:
                end = int(np.searchsorted(contexts, contexts[end - 1], side="right"))
            taken.append((file, keys[start:end], rows[start:end]))
            room -= end - start
            start = end
            if room <= 0:
                units.append(_unit(taken, late))
                taken, room = [], size
    return [*units, _unit(taken, late)] if taken else units


def even_size(total: int, most: int) -> int:
    """The size of as few equal units as hold ``total``, each at most ``most``."""
    return -(-total // max(1, -(-total // most)))


def contexts_of(keys: Keys) -> Keys:
    """What passages are read in, (n,) S10: those of late chunking that are read together have the same (see passages)."""
    return keys.astype(f"S{CONTEXT_BYTES}")


def whole_contexts(keys: Keys, kept: npt.NDArray[np.int64], missing: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """``missing`` rows of a part, (rows,), and all others of their contexts, each key once; ``kept``: rows that count."""
    rows = kept[np.unique(keys[kept], return_index=True)[1]]
    found = np.zeros(len(keys), dtype=bool)
    found[rows] = np.isin(contexts_of(keys[rows]), contexts_of(keys[missing]))
    return found


def _unit(parts: Sequence[Rows], late: bool) -> EmbedUnit:
    """Passages of some parts."""
    keys = np.concatenate([keys for _, keys, _ in parts])
    picks = tuple(Pick(file=file, runs=_runs(rows)) for file, _, rows in parts)
    return EmbedUnit(name=sha256(np.sort(keys).tobytes())[:20], picks=picks, passages=len(keys), late=late)


def put_embeddings(
    storage: Storage, folder: str, keys: Keys, vectors: npt.NDArray[np.float32], failed: Mapping[int, str], draft: Record
) -> Record:
    """Store the vectors of a unit as float16 and create its record, which adds files and counts to ``draft``.

    Rows in ``failed`` (row -> ``<code>: <reason>``) go to the quarantine beside it. Raises EncoderError on another vector that
    is no unit vector.
    """
    started = time.perf_counter()
    good = np.array([row not in failed for row in range(len(keys))], dtype=bool)
    norms = np.linalg.norm(vectors[good], axis=1)
    if not np.allclose(norms, 1, atol=1e-3):
        raise EncoderError(f"unit {draft.unit}: vectors of lengths {norms.min()} to {norms.max()}, expected 1")
    table = pa.table(
        {"key": fixed_binary(keys[good]), "embedding": fixed_binary(vectors[good].astype(np.float16))},
        schema=embedding_schema(vectors.shape[1], folder),
    )
    stem = f"{folder}/{draft.unit}"
    file = put_data(storage, stem, ".parquet", parquet_bytes(table, compress=False), table.num_rows)
    rejected = None
    if failed:
        codes, reasons = zip(*(failed[row].split(": ", 1) for row in sorted(failed)), strict=True)
        columns = {"key": fixed_binary(keys[~good]), "code": codes, "message": reasons}
        data = parquet_bytes(pa.table(columns, schema=REJECTED_SCHEMA), compress=True)
        rejected = put_data(storage, stem, ".rejected.parquet", data, len(failed))
    counts = draft.counts | {"passages": table.num_rows, "rejected": len(failed)}
    timings = draft.timings_s | {"write": time.perf_counter() - started}
    update = {"files": (file,), "rejected": rejected, "counts": counts, "timings_s": timings}
    return put_record(storage, folder, draft.model_copy(update=update))


def stored_keys(storage: Storage, folder: str, records: Sequence[Record]) -> Keys:
    """Sorted distinct keys that have a vector: 16 bytes of memory per passage."""
    return _distinct([read_keys(storage, folder, record.files[0]) for record in records])


def quarantined_keys(storage: Storage, folder: str, records: Sequence[Record]) -> Keys:
    """Sorted distinct keys that this encoder can make no vector of."""
    found = _distinct([read_keys(storage, folder, record.rejected) for record in records if record.rejected])
    return found[~is_among(found, stored_keys(storage, folder, records))] if len(found) else found


def _distinct(keys: Sequence[Keys]) -> Keys:
    return np.unique(np.concatenate(keys)) if keys else np.empty(0, dtype=KEY_DTYPE)


def embedding_schema(dim: int, encoder: str) -> Any:
    """Arrow schema of a shard: 16-byte key, ``dim`` little-endian float16, and the encoder's fingerprint."""
    return pa.schema(
        [pa.field("key", pa.binary(KEY_BYTES), nullable=False), pa.field("embedding", pa.binary(2 * dim), nullable=False)],
        metadata={ENCODER: encoder.encode()},
    )


def open_embeddings(storage: Storage, encoder: str, record: Record, dim: int, ahead_bytes: int) -> Cursor:
    """A shard, to be read forward; raises VerificationError when it is of another encoder or dimension."""
    file = record.files[0]
    cursor = Cursor(storage, encoder, file, ["key", "embedding"], ahead_bytes=ahead_bytes)
    found = (cursor.schema.metadata or {}).get(ENCODER, b"none").decode()
    width = cursor.schema.field("embedding").type.byte_width
    if (found, width) != (encoder, 2 * dim):
        raise VerificationError(
            f"{storage.at(encoder)}/{file.name}: {width // 2} dimensions by encoder {found}, expected {dim} by {encoder}; "
            "delete its record and run again"
        )
    return cursor


def vectors_of(column: Any, dim: int) -> Half:
    """Embedding column -> (n, dim) float16; raises VerificationError when the shard has another dimension."""
    if column.type.byte_width != 2 * dim:
        raise VerificationError(
            f"an embedding shard has {column.type.byte_width // 2} dimensions, expected {dim}; it is of another encoder"
        )
    return cast(Half, to_rows(column, np.float16)).reshape(-1, dim)


def _runs(rows: npt.NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    """Ascending row numbers as runs (first, end)."""
    starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
    ends = [*starts[1:], len(rows)]
    return tuple((int(rows[start]), int(rows[end - 1]) + 1) for start, end in zip(starts, ends, strict=True))
