"""Drift: how well a trained index fits the vectors in it, and whether it still fits those of today.

A trained index is reused from run to run, so its lists and codebooks grow old with the corpus. Every artifact is measured
(``Health``) and compared with the first artifact that was made with its trained index.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.config import Config
from pipeline.index import Trained
from pipeline.manifest import ArtifactManifest, Evaluation, Health, TrainedManifest
from pipeline.recall import Matrix

MAX_IMBALANCE = 1.5
"""Times that of the baseline: a query then visits half as many vectors again in the same number of lists."""
MAX_MORE_EMPTY_LISTS = 0.1
MAX_QUANTIZATION_ERROR = 1.1


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
    )


def judge(now: Evaluation, trained: TrainedManifest, before: ArtifactManifest | None, config: Config) -> Verdict:
    """Compare an artifact with the first one of its trained index, which the artifact ``before`` it knows.

    Tiny corpora, whose recall is not gated either, are never over a limit.
    """
    if before is None or before.index.trained != trained.trained:
        drifted = f", because the one before has drifted: {'; '.join(before.drifted)}" if before and before.drifted else ""
        return Verdict(f"trained for this corpus{drifted}")
    found = [*_of_lists(now.health, before.baseline.health), _of_recall(now, before.baseline, config)]
    reasons = tuple(words for words, is_over in found if is_over and now.gated)
    return Verdict("fits still: " + "; ".join(words for words, _ in found), reasons, before.baseline)


def _of_lists(now: Health | None, then: Health | None) -> list[tuple[str, bool]]:
    if now is None or then is None:
        return []
    imbalance, empty = MAX_IMBALANCE * then.imbalance, then.empty_lists + MAX_MORE_EMPTY_LISTS * then.lists
    found = [
        (_words("imbalance", f"{now.imbalance:.2f}", f"{then.imbalance:.2f}", f"{imbalance:.2f}"), now.imbalance > imbalance),
        (_words(f"empty lists of {now.lists}", now.empty_lists, then.empty_lists, f"{empty:g}"), now.empty_lists > empty),
    ]
    if now.quantization_error is not None and then.quantization_error is not None:
        limit = MAX_QUANTIZATION_ERROR * then.quantization_error
        values = (f"{value:.4f}" for value in (now.quantization_error, then.quantization_error, limit))
        found.append((_words("quantization error", *values), now.quantization_error > limit))
    return found


def _of_recall(now: Evaluation, then: Evaluation, config: Config) -> tuple[str, bool]:
    """Recall that is surely under what the trained index once reached of its target, or under the gate."""
    limit = min(then.recall, config.index.target_recall) if now.asked == then.asked else 0.0
    gate = config.publish.min_recall
    words = _words(f"recall@{now.k}", f"{now.recall:.4f}", f"{then.recall:.4f}", f"{max(limit, gate):.4f}")
    return words, now.recall_high < limit or now.recall < gate


def _words(what: str, now: object, then: object, limit: object) -> str:
    return f"{what} {now} ({then} when trained, limit {limit})"
