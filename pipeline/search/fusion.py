"""Several rankings of the same query become one."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipeline.ann.recall import Ordinals

RRF_K = 60
"""The constant of reciprocal rank fusion, as in Cormack, Clarke and Büttcher (2009); not tuned here."""

Fusion = Literal["rrf", "weighted"]
Scores = npt.NDArray[np.float32]
Ranking = tuple[Scores, Ordinals]
"""Scores and ordinals of one query, (n,) each, best first, each ordinal once."""


def fuse(rankings: Sequence[Ranking], weights: Sequence[float], how: Fusion) -> Ranking:
    """One ranking of all ordinals that any has, ties by ordinal.

    ``rrf``: the sum of weight / (60 + rank). ``weighted``: the sum of weight x score, each ranking's scores moved and scaled to
    0..1 first; what a ranking does not have counts 0 in it.
    """
    ordinals = np.unique(np.concatenate([found for _, found in rankings]))
    total = np.zeros(len(ordinals), dtype=np.float64)
    for weight, (scores, found) in zip(weights, rankings, strict=True):
        if len(found):
            each = 1 / (RRF_K + 1 + np.arange(len(found))) if how == "rrf" else _scaled(scores)
            total[np.searchsorted(ordinals, found)] += weight * each
    order = np.lexsort((ordinals, -total))
    return total[order].astype(np.float32), ordinals[order]


def _scaled(scores: Scores) -> npt.NDArray[np.float64]:
    """Min-max; equal scores are all 1."""
    low, high = float(scores.min()), float(scores.max())
    return np.ones(len(scores)) if high == low else (scores.astype(np.float64) - low) / (high - low)
