"""Drift: how well a trained index fits the vectors in it, and whether it still fits those of today.

A trained index is reused from run to run, so its lists and codebooks grow old with the corpus. Every artifact is measured
(``Health``) and compared with the first artifact that was made with its trained index.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.ann.index import Trained
from pipeline.ann.recall import Matrix
from pipeline.config import Config
from pipeline.root.manifest import ArtifactManifest, Evaluation, Health, Histogram, TrainedManifest, Values

MAX_IMBALANCE = 1.5
"""Times that of the baseline: a query then visits half as many vectors again in the same number of lists."""
MAX_MORE_EMPTY_LISTS = 0.1
MAX_QUANTIZATION_ERROR = 1.1
HISTOGRAM_BINS = 24


class Measure(Values):
    """One number of an artifact, as it was when its index was trained, and the limit that makes it train again."""

    name: str
    now: float
    then: float
    limit: float
    is_over: bool
    form: str

    def __str__(self) -> str:
        now, then, limit = (f"{value:{self.form}}" for value in (self.now, self.then, self.limit))
        return f"{self.name} {now} ({then} when trained, limit {limit})"


@dataclass(frozen=True)
class Verdict:
    """``reasons``: measures over their limits, empty while the trained index fits; ``numbers``: every measure in words.

    ``baseline``: the evaluation that was compared with, None where the trained index is new.
    """

    numbers: str
    reasons: tuple[str, ...] = ()
    baseline: Evaluation | None = None

    def __str__(self) -> str:
        return f"drifted: {'; '.join(self.reasons)}" if self.reasons else self.numbers


def measure(sizes: list[int], trained: Trained | None, sample: Matrix) -> Health | None:
    """Health of an index with these list sizes; ``sample``: (n, dim) of its vectors. None for an index without lists.

    Imbalance is FAISS's imbalance factor: lists x sum of squared sizes / squared sum, 1 where all are equal. The
    quantization error is the mean squared distance of a vector to what its code decodes to; None without ``trained``.
    """
    if not sizes:
        return None
    counts = np.asarray(sizes, dtype=np.float64)
    total = counts.sum()
    return Health(
        lists=len(sizes),
        empty_lists=int((counts == 0).sum()),
        imbalance=float(len(sizes) * (counts**2).sum() / total**2) if total else 1.0,
        quantization_error=trained.error(sample) if trained and len(sample) else None,
        sizes=histogram(np.bincount(sizes)),
    )


def histogram(counts: npt.NDArray[np.int64]) -> Histogram:
    """Whole numbers in bins of equal width; ``counts[n]``: how often there is n."""
    width = max(1, -(-len(counts) // HISTOGRAM_BINS))
    padded = np.pad(counts, (0, -len(counts) % width)).reshape(-1, width).sum(axis=1)
    return Histogram(edges=tuple(float(width * edge) for edge in range(len(padded) + 1)), counts=tuple(padded.tolist()))


def judge(now: Evaluation, trained: TrainedManifest, before: ArtifactManifest | None, config: Config) -> Verdict:
    """Compare an artifact with the first one of its trained index, which the artifact ``before`` it knows.

    Tiny corpora, whose recall is not gated either, are never over a limit.
    """
    if before is None or before.index.trained != trained.trained:
        drifted = f", because the one before has drifted: {'; '.join(before.drifted)}" if before and before.drifted else ""
        return Verdict(f"trained for this corpus{drifted}")
    found = compare(now, before.baseline, config)
    reasons = tuple(str(each) for each in found if each.is_over and now.gated)
    return Verdict("fits still: " + "; ".join(str(each) for each in found), reasons, before.baseline)


def compare(now: Evaluation, then: Evaluation, config: Config) -> list[Measure]:
    """Every measure of an artifact beside that of its baseline."""
    return [*_of_lists(now.health, then.health), _of_recall(now, then, config)]


def _of_lists(now: Health | None, then: Health | None) -> list[Measure]:
    if now is None or then is None:
        return []
    found = [
        _measure("imbalance", now.imbalance, then.imbalance, MAX_IMBALANCE * then.imbalance, ".2f"),
        _measure(
            f"empty lists of {now.lists}",
            now.empty_lists,
            then.empty_lists,
            then.empty_lists + MAX_MORE_EMPTY_LISTS * then.lists,
            "g",
        ),
    ]
    if now.quantization_error is not None and then.quantization_error is not None:
        limit = MAX_QUANTIZATION_ERROR * then.quantization_error
        found.append(_measure("quantization error", now.quantization_error, then.quantization_error, limit, ".4f"))
    return found


def _of_recall(now: Evaluation, then: Evaluation, config: Config) -> Measure:
    """Recall that is surely under what the trained index once reached of its target, or under the gate."""
    limit = min(then.recall, config.index.target_recall) if now.asked == then.asked else 0.0
    gate = config.publish.min_recall
    is_over = now.recall_high < limit or now.recall < gate
    return Measure(
        name=f"recall@{now.k}", now=now.recall, then=then.recall, limit=max(limit, gate), is_over=is_over, form=".4f"
    )


def _measure(name: str, now: float, then: float, limit: float, form: str) -> Measure:
    return Measure(name=name, now=now, then=then, limit=limit, is_over=now > limit, form=form)
