"""Embedding units ready for the encoder: texts read and tokenized once, as arrays that travel through Ray."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import layout
from pipeline.batching import lengths_of
from pipeline.embeddings import EmbedUnit, Pick
from pipeline.model import EncoderSpec
from pipeline.shards import KEY_DTYPE, ROW_GROUP_ROWS, Keys, keys_of, open_parquet
from pipeline.storage import Storage
from pipeline.tokenizer import TextTokenizer
from pipeline.windows import document_tokens

Counts = npt.NDArray[np.int32]


@dataclass(frozen=True)
class TokenizedUnit:
    """Keys ascending, and all token ids in one array, (t,), cut into rows by ``lengths``.

    ``windows``: how many rows each passage has, one after the other.
    """

    name: str
    keys: Keys
    ids: Counts
    lengths: Counts
    windows: Counts
    timings_s: dict[str, float]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "TokenizedUnit":
        """What ``as_row`` gave."""
        ids, lengths, windows = (np.frombuffer(row[name], dtype=np.int32) for name in ("ids", "lengths", "windows"))
        keys = np.frombuffer(row["keys"], dtype=KEY_DTYPE)
        return cls(row["name"], keys, ids, lengths, windows, row["timings_s"])

    def as_row(self) -> dict[str, Any]:
        """Plain values and bytes."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value.tobytes() if isinstance(value, np.ndarray) else value for name, value in values.items()}

    @cached_property
    def tokens(self) -> list[npt.NDArray[np.int32]]:
        """The rows of token ids."""
        return np.split(self.ids, np.cumsum(self.lengths)[:-1])

    def piece(self, passages: Sequence[int]) -> "TokenizedUnit":
        """Some of its passages, one or more."""
        chosen = np.asarray(passages)
        windows, ends = self.windows[chosen], np.cumsum(self.windows)[chosen]
        rows = np.concatenate([np.arange(end - count, end) for end, count in zip(ends, windows, strict=True)])
        tokens = [self.tokens[row] for row in rows]
        flat, lengths = np.concatenate(tokens), lengths_of(tokens).astype(np.int32)
        return TokenizedUnit(self.name, self.keys[chosen], flat, lengths, windows, self.timings_s)


def tokenize_unit(unit: EmbedUnit, storage: Storage, tokenizer: TextTokenizer, spec: EncoderSpec) -> TokenizedUnit:
    """Read the texts of a unit and tokenize them, with the prompt."""
    started = time.perf_counter()
    table = pa.concat_tables([_read_rows(storage, pick) for pick in unit.picks])
    read_s = time.perf_counter() - started
    order = np.argsort(keys_of(table.column("key")))
    table = table.take(order)
    ids, windows = document_tokens(tokenizer, spec, table.column("text").to_pylist())
    lengths = lengths_of(ids).astype(np.int32)
    flat = np.fromiter((token for tokens in ids for token in tokens), dtype=np.int32, count=int(lengths.sum()))
    timings = {"read": read_s, "tokenize": time.perf_counter() - started - read_s}
    keys = keys_of(table.column("key"))
    return TokenizedUnit(unit.name, keys, flat, lengths, np.array(windows, dtype=np.int32), timings)


def _read_rows(storage: Storage, pick: Pick) -> Any:
    """Key and text of some rows of a snapshot part; reads only the row groups that hold them."""
    rows = np.concatenate([np.arange(first, end) for first, end in pick.runs])
    groups = np.unique(rows // ROW_GROUP_ROWS)
    starts = np.searchsorted(groups, rows // ROW_GROUP_ROWS) * ROW_GROUP_ROWS
    with open_parquet(storage, layout.PASSAGES, pick.file) as parquet:
        table = parquet.read_row_groups([int(group) for group in groups], columns=["key", "text"])
    return table.take(starts + rows % ROW_GROUP_ROWS)
