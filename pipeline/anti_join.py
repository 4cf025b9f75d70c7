"""Which passages of a snapshot the embedding store lacks: an anti-join by ranges of keys, in bounded memory. No Ray here.

Snapshot parts and embedding shards are sorted by key, and keys are hashes: equal ranges of them hold about equally many, and
are a slice of each file. What is kept of all of them is a byte per passage.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pipeline import layout
from pipeline.manifest import DataFile, Record
from pipeline.shards import KEY_DTYPE, Keys, is_among, key_bounds, read_key_range
from pipeline.snapshot import Part
from pipeline.storage import Storage

KEYS_AT_ONCE = 1 << 24
"""Of snapshot and store together, 16 bytes each; sorting them takes four times that."""

Missing = npt.NDArray[np.bool_]
"""(rows of the part,): which of them are to be encoded."""


def missing_passages(
    storage: Storage,
    found: Sequence[Part],
    embeddings: Storage,
    folder: str,
    records: Sequence[Record],
    keys_at_once: int = KEYS_AT_ONCE,
) -> list[Missing]:
    """For each part its rows that count and whose key is in no shard and in no quarantine; the first of each key.

    The result does not depend on ``keys_at_once``: memory does, about 80 bytes for each of them.
    """
    known = [file for record in records for file in (*record.files, record.rejected) if file]
    missing = [np.zeros(part.file.rows, dtype=bool) for part in found]
    total = sum(part.file.rows for part in found) + sum(file.rows for file in known)
    for low, high in pairwise([None, *key_bounds(total, keys_at_once)]):
        pieces = [read_key_range(storage, layout.PASSAGES, part.file, low, high) for part in found]
        starts = np.cumsum([0, *(len(keys) for _, keys in pieces)])
        keys = _joined([keys for _, keys in pieces])
        counts = np.ones(len(keys), dtype=bool)
        for part, (first, own), start in zip(found, pieces, starts[:-1], strict=True):
            masked = part.masked[(part.masked >= first) & (part.masked < first + len(own))]
            counts[start + masked - first] = False
        rows = np.flatnonzero(counts)
        distinct, at = np.unique(keys[rows], return_index=True)
        lacking = np.sort(rows[at[~is_among(distinct, _stored(embeddings, folder, known, low, high))]])
        for mask, (first, _), start, end in zip(missing, pieces, starts[:-1], starts[1:], strict=True):
            mask[first + lacking[(lacking >= start) & (lacking < end)] - start] = True
    return missing


def _stored(storage: Storage, folder: str, files: Sequence[DataFile], low: bytes | None, high: bytes | None) -> Keys:
    return np.unique(_joined([read_key_range(storage, folder, file, low, high)[1] for file in files]))


def _joined(keys: Sequence[Keys]) -> Keys:
    return np.concatenate([np.empty(0, dtype=KEY_DTYPE), *keys])
