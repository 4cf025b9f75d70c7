"""Rows of length 1: which are, why one is not, and what the windows of a text have in common."""

from collections.abc import Mapping
from typing import cast

import numpy as np
import numpy.typing as npt

from pipeline.encoding.batching import Vectors

NORM_TOLERANCE = 1e-3


def mean_of_windows(
    vectors: Vectors, failed: Mapping[int, str], windows: npt.NDArray[np.int64]
) -> tuple[Vectors, dict[int, str]]:
    """The means of the vectors of each text's windows, of length 1 again, and the texts of which a window failed."""
    ends = np.cumsum(windows)
    means = np.add.reduceat(vectors, ends - windows, axis=0)
    with np.errstate(invalid="ignore"):
        means /= np.linalg.norm(means, axis=1, keepdims=True)
    lost = {int(row): "E_ZERO_NORM: the vectors of its windows cancel each other" for row in np.flatnonzero(~are_unit(means))}
    return means, lost | {int(np.searchsorted(ends, row, side="right")): failed[row] for row in sorted(failed, reverse=True)}


def why_none(vector: Vectors, tokens: int) -> str:
    """Why a text has no vector, alone and in FP32: ``<code>: <reason>``."""
    if np.isinf(vector).all():
        return f"E_OOM: {tokens} tokens, no memory for it alone; give the encoder more or lower encoder.max_tokens"
    if not vector.any():
        return f"E_ZERO_NORM: {tokens} tokens, its vector is zero, alone and in fp32"
    return f"E_NONFINITE: {tokens} tokens, its vector is not finite, alone and in fp32"


def are_unit(vectors: Vectors) -> npt.NDArray[np.bool_]:
    """For each row whether it is finite and of length 1."""
    return cast(npt.NDArray[np.bool_], np.abs(np.linalg.norm(vectors, axis=1) - 1) < NORM_TOLERANCE)
