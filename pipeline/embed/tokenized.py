"""Embedding units ready for the encoder: texts read and tokenized once, as arrays that travel through Ray."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.embed.embeddings import EmbedUnit, Pick, contexts_of
from pipeline.encoding.batching import Tokens, lengths_of
from pipeline.encoding.model import EncoderSpec
from pipeline.encoding.tokenizer import TextTokenizer
from pipeline.encoding.windows import Spans, context_tokens, document_tokens
from pipeline.root import layout
from pipeline.root.shards import KEY_DTYPE, ROW_GROUP_ROWS, Keys, keys_of, read_row_groups
from pipeline.root.storage import Storage

Counts = npt.NDArray[np.int32]

NO_SPANS: Spans = np.empty((0, 3), dtype=np.int32)


@dataclass(frozen=True)
class TokenizedUnit:
    """Keys ascending, and all token ids in one array, (t,), cut into rows by ``lengths``.

    ``windows``: how many rows each passage has, one after the other. ``spans``: which part of which row each is instead, in
    late chunking; else empty.
    """

    name: str
    keys: Keys
    ids: Counts
    lengths: Counts
    windows: Counts
    spans: Spans
    timings_s: dict[str, float]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "TokenizedUnit":
        """What ``as_row`` gave."""
        ids, lengths, windows, spans = (
            np.frombuffer(row[name], dtype=np.int32) for name in ("ids", "lengths", "windows", "spans")
        )
        keys = np.frombuffer(row["keys"], dtype=KEY_DTYPE)
        return cls(row["name"], keys, ids, lengths, windows, spans.reshape(-1, 3), row["timings_s"])

    def as_row(self) -> dict[str, Any]:
        """Plain values and bytes."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value.tobytes() if isinstance(value, np.ndarray) else value for name, value in values.items()}

    @cached_property
    def tokens(self) -> list[npt.NDArray[np.int32]]:
        """The rows of token ids."""
        return np.split(self.ids, np.cumsum(self.lengths)[:-1])

    @property
    def together(self) -> list[list[int]]:
        """The passages that are encoded together, whatever else is: of one row in late chunking, else each by itself."""
        if not len(self.spans):
            return [[number] for number in range(len(self.keys))]
        order = np.argsort(self.spans[:, 0], kind="stable")
        return [group.tolist() for group in np.split(order, np.flatnonzero(np.diff(self.spans[order, 0])) + 1)]

    def piece(self, passages: Sequence[int]) -> "TokenizedUnit":
        """Some of its passages, one or more."""
        chosen = np.asarray(passages)
        spans, windows, ends = NO_SPANS, self.windows[chosen], np.cumsum(self.windows)[chosen]
        if len(self.spans):
            rows, places = np.unique(self.spans[chosen, 0], return_inverse=True)
            spans = np.column_stack([places, self.spans[chosen, 1:]]).astype(np.int32)
        else:
            rows = np.concatenate([np.arange(end - count, end) for end, count in zip(ends, windows, strict=True)])
        tokens = [self.tokens[row] for row in rows]
        flat, lengths = np.concatenate(tokens), lengths_of(tokens).astype(np.int32)
        return TokenizedUnit(self.name, self.keys[chosen], flat, lengths, windows, spans, self.timings_s)


def tokenize_unit(unit: EmbedUnit, storage: Storage, tokenizer: TextTokenizer, spec: EncoderSpec) -> TokenizedUnit:
    """Read the texts of a unit and tokenize them, with the prompt."""
    started = time.perf_counter()
    columns = ["key", "text", *(["start", "end"] if unit.late else [])]
    table = pa.concat_tables([_read_rows(storage, pick, columns) for pick in unit.picks])
    read_s = time.perf_counter() - started
    order = np.argsort(keys_of(table.column("key")))
    table = table.take(order)
    if unit.late:
        ids, spans = _in_contexts(table, tokenizer, spec.document_prompt)
        windows = [1] * len(table)
    else:
        ids, windows = document_tokens(tokenizer, spec, table.column("text").to_pylist())
        spans = NO_SPANS
    lengths = lengths_of(ids).astype(np.int32)
    flat = np.fromiter((token for tokens in ids for token in tokens), dtype=np.int32, count=int(lengths.sum()))
    timings = {"read": read_s, "tokenize": time.perf_counter() - started - read_s}
    keys = keys_of(table.column("key"))
    return TokenizedUnit(unit.name, keys, flat, lengths, np.array(windows, dtype=np.int32), spans, timings)


def _in_contexts(table: Any, tokenizer: TextTokenizer, prompt: str) -> tuple[list[Tokens], Spans]:
    """Token ids of what passages are read in, and where those are in it. Rows are in the order of their keys."""
    rows = table.select(["text", "start", "end"]).to_pylist()
    contexts = contexts_of(keys_of(table.column("key")))
    tokens: list[Tokens] = []
    spans: list[tuple[int, int, int]] = []
    for own in np.split(np.arange(len(rows)), np.flatnonzero(contexts[1:] != contexts[:-1]) + 1):
        ends = [rows[own[0]]["start"], *(rows[row]["end"] for row in own[:-1])]
        pieces = [(end < rows[row]["start"], rows[row]["text"]) for end, row in zip(ends, own, strict=True)]
        read = context_tokens(tokenizer, prompt, pieces) if len(own) > 1 else None
        if read is None:  # one alone, or more than the model takes: each by itself
            alone = tokenizer([prompt + text for _, text in pieces])
            spans += [(len(tokens) + number, 0, len(ids)) for number, ids in enumerate(alone)]
            tokens += alone
        else:
            ids, starts = read
            spans += [(len(tokens), start, end) for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]
            tokens.append(ids)
    return tokens, np.array(spans, dtype=np.int32)


def _read_rows(storage: Storage, pick: Pick, columns: list[str]) -> Any:
    """Some rows of a snapshot part; reads only the row groups that hold them."""
    rows = np.concatenate([np.arange(first, end) for first, end in pick.runs])
    groups = np.unique(rows // ROW_GROUP_ROWS)
    starts = np.searchsorted(groups, rows // ROW_GROUP_ROWS) * ROW_GROUP_ROWS
    table = read_row_groups(storage, layout.PASSAGES, pick.file, columns, groups.tolist())
    return table.take(starts + rows % ROW_GROUP_ROWS)
