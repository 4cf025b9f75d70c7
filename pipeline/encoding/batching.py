"""Packing texts of known token counts into batches that are almost free of padding. Pure functions on arrays."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Tokens = Sequence[int] | npt.NDArray[np.int32]
"""Token ids of one text."""
Vectors = npt.NDArray[np.float32]
"""(n, dim), rows of length 1."""
Places = npt.NDArray[np.int64]
"""(n,): numbers of texts, or of parts of them."""
Lengths = npt.NDArray[np.int64]
"""(n,) token counts."""
Padded = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""Token ids and attention mask of a batch, both (rows, width)."""

Result = TypeVar("Result")


def lengths_of(tokens: Sequence[Tokens]) -> Lengths:
    """Token counts of texts."""
    return np.fromiter(map(len, tokens), dtype=np.int64, count=len(tokens))


def pack_batches(lengths: Lengths, budget: int) -> Iterator[tuple[int, int]]:
    """Cut descending token counts into runs (first, end) of at most ``budget`` padded tokens; a longer text goes alone."""
    first = 0
    while first < len(lengths):
        end = min(len(lengths), first + max(1, budget // max(1, int(lengths[first]))))
        yield first, end
        first = end


def run_within(
    lengths: Lengths, budget: int, run: Callable[[int, int], Result], too_large: type[Exception]
) -> tuple[list[Result | None], int]:
    """Run all batches of texts in order of descending length; halve the budget when one does not fit, for the rest too.

    ``run(first, end)`` raises ``too_large`` for a batch that does not fit. Returns the results in order, None for a
    text that does not even fit alone, and the budget that fitted.
    """
    results: list[Result | None] = []
    first = 0
    while first < len(lengths):
        end = first + next(pack_batches(lengths[first:], budget))[1]
        try:
            results.append(run(first, end))
        except too_large:
            if end - first > 1:
                budget = max(1, int(lengths[first])) * (end - first) // 2
                continue
            results.append(None)
        first = end
    return results, budget


def pad(batch: Sequence[Tokens], pad_id: int, *, multiple: int = 1) -> Padded:
    """A batch as rectangles, as wide as its longest text, rounded up to a ``multiple``."""
    width = -(-max(1, *(len(ids) for ids in batch)) // multiple) * multiple
    ids = np.full((len(batch), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(batch), width), dtype=np.int64)
    for row, tokens in enumerate(batch):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return ids, mask
