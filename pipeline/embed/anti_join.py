"""Which passages of a snapshot the embedding store lacks: an anti-join by ranges of keys, in bounded memory. No Ray here.

A partitioned hash join: keys are hashes already, so they are dealt out to scratch files, a range of keys each, in one pass over
the snapshot and one over the store; then range by range is joined. What is kept of all passages is a byte of each.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.embed.embeddings import Rows, whole_contexts
from pipeline.ingest.snapshot import Part
from pipeline.root import layout
from pipeline.root.manifest import Record
from pipeline.root.shards import KEY_DTYPE, Keys, is_among, key_bounds, read_keys
from pipeline.root.storage import Storage

KEYS_AT_ONCE = 1 << 24
"""Of snapshot and store together, 16 bytes each; joining them takes five times that."""

Missing = npt.NDArray[np.bool_]
"""(rows of the part,): which of them are to be encoded."""


def missing_passages(
    storage: Storage,
    found: Sequence[Part],
    embeddings: Storage,
    folder: str,
    records: Sequence[Record],
    *,
    scratch: Path | None = None,
    keys_at_once: int = KEYS_AT_ONCE,
) -> list[Missing]:
    """For each part its rows that count and whose key is in no shard and in no quarantine; the first of each key.

    The result does not depend on ``keys_at_once``: memory does, about 80 bytes for each of them.
    """
    known = [file for record in records for file in (*record.files, record.rejected) if file]
    bounds = list(key_bounds(sum(file.rows for file in [*(part.file for part in found), *known]), keys_at_once))
    missing = [np.zeros(part.file.rows, dtype=bool) for part in found]
    with ExitStack() as stack:
        passages, stored = _Dealt(stack, scratch, bounds), _Dealt(stack, scratch, bounds)
        for part in found:
            passages.add(read_keys(storage, layout.PASSAGES, part.file))
        for file in known:
            stored.add(read_keys(embeddings, folder, file))
        for number in range(len(bounds)):
            _join(found, missing, passages.range(number), np.unique(stored.range(number)[0]))
    return missing


def missing_rows(storage: Storage, found: Sequence[Part], missing: Sequence[Missing], *, late: bool) -> Iterator[Rows]:
    """What ``missing_passages`` found, part by part; ``late``: with all that is read together with it."""
    for part, mask in zip(found, missing, strict=True):
        if mask.any():
            keys = read_keys(storage, layout.PASSAGES, part.file)
            rows = np.flatnonzero(whole_contexts(keys, part.kept, mask) if late else mask)
            yield part.file, keys[rows], rows


def _join(found: Sequence[Part], missing: Sequence[Missing], passages: tuple[Keys, "_Places"], stored: Keys) -> None:
    """Mark the missing rows of a range of keys."""
    keys, (firsts, counts) = passages
    ends = np.cumsum(counts)
    starts = ends - counts
    counted = np.ones(len(keys), dtype=bool)
    for part, first, start, end in zip(found, firsts, starts, ends, strict=True):
        masked = part.masked[(part.masked >= first) & (part.masked < first + end - start)]
        counted[start + masked - first] = False
    rows = np.flatnonzero(counted)
    distinct, at = np.unique(keys[rows], return_index=True)
    lacking = np.sort(rows[at[~is_among(distinct, stored)]])
    for mask, first, start, end in zip(missing, firsts, starts, ends, strict=True):
        mask[first + lacking[np.searchsorted(lacking, start) : np.searchsorted(lacking, end)] - start] = True


_Places = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""For each file the number of its first row in a range, and how many it has there."""


class _Dealt:
    """Sorted keys of files, dealt out to a scratch file for each range of keys."""

    def __init__(self, stack: ExitStack, scratch: Path | None, bounds: Sequence[bytes | None]) -> None:
        self._bounds = np.array([bound for bound in bounds if bound is not None], dtype=KEY_DTYPE)
        self._files = [stack.enter_context(tempfile.TemporaryFile(dir=scratch)) for _ in bounds]  # noqa: SIM115 - they are
        self._cuts: list[npt.NDArray[np.int64]] = []

    def add(self, keys: Keys) -> None:
        """The keys of the next file, ascending."""
        cuts = np.array([0, *np.searchsorted(keys, self._bounds), len(keys)], dtype=np.int64)
        for file, start, end in zip(self._files, cuts[:-1], cuts[1:], strict=True):
            file.write(keys[start:end].tobytes())
        self._cuts.append(cuts)

    def range(self, number: int) -> tuple[Keys, _Places]:
        """The keys of a range, file after file, and where those of each file are from."""
        file = self._files[number]
        file.seek(0)
        keys = np.frombuffer(file.read(), dtype=KEY_DTYPE)
        cuts = np.array(self._cuts, dtype=np.int64).reshape(len(self._cuts), len(self._files) + 1)
        return keys, (cuts[:, number], cuts[:, number + 1] - cuts[:, number])
