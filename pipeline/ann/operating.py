"""Operating points: which search settings find how much, and how fast; measured, then picked by what is asked for.

A setting is (nprobe, rescore). One search per nprobe at the greatest depth gives the recall of every lesser depth, since
its candidates are the first of the same list; only settings that no cheaper one equals are timed.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.ann.collection import Collection, width
from pipeline.ann.index_parts import one_thread
from pipeline.ann.recall import Matrix, Ordinals, Recall, drop_self, exact_search, recall, score, top
from pipeline.ann.vectors import Int8Vectors, Vectors, gather
from pipeline.errors import ConfigError
from pipeline.root.manifest import OperatingPoint

LATENCY_QUERIES = 50
RESCORE_STEPS = (5, 10, 20, 50, 100)
"""Candidates re-scored per asked neighbour. Without any, codes of half a bit per dimension find a third less."""
HARDLY_MORE = 1.1
HARDLY_MORE_MS = 0.1
"""Times nearer than this are noise: small indexes then take the setting that finds most, on any machine."""
ENOUGH_GAIN = 0.0005
"""A setting that finds no more than that share of the neighbours above a cheaper one is not worth having."""


@dataclass(frozen=True)
class Truth:
    """Held-out queries and their exact answers. ``own``: each query's own ordinal, or None for queries from outside."""

    queries: Matrix
    scores: Matrix
    own: Ordinals | None
    k: int


@dataclass(frozen=True)
class Measured:
    """A setting with what it finds; ``point.latency_ms`` is the median of single queries on one thread."""

    point: OperatingPoint
    recall: Recall


def ground_truth(vectors: Vectors, queries: Matrix, own: Ordinals | None, k: int) -> Truth:
    """Exact answers for (q, dim) queries, without the queries themselves."""
    depth = k if own is None else k + 1
    scores, ordinals = exact_search(vectors, queries, depth)
    if own is not None:
        scores, ordinals = drop_self(scores, ordinals, own, k)
    return Truth(queries, scores, own, k)


def measure(
    collection: Collection, truth: Truth, target: float, *, nprobe: int | None = None, rescoring: int | None = None
) -> list[Measured]:
    """Settings worth having, cheapest first; ``nprobe`` and ``rescoring`` are kept where they are given.

    More lists are visited until ``target`` is reached and more would find hardly more.
    """
    total = collection.index.lists
    scores = Scores(collection.rescorer, truth.queries) if collection.rescorer is not None else None
    steps = [0] if not total or collection.rescorer is None else [rescoring] if rescoring is not None else list(RESCORE_STEPS)
    found: list[tuple[int, int, Recall]] = []
    last = 0.0
    for lists in [nprobe] if nprobe and total else _ladder(total):
        found += [(lists, step, value) for step, value in _recalls(collection, truth, scores, lists, steps)]
        best = found[-1][2].mean
        if best >= target and best - last < ENOUGH_GAIN:
            break
        last = best
    return [_timed(collection, truth, lists, step, value) for lists, step, value in _worthwhile(found, target)]


def choose(measured: Sequence[Measured], target: float, max_latency_ms: float | None) -> Measured:
    """The fastest that reaches ``target``, or finds more in hardly more time; else the one that finds most.

    Of those within ``max_latency_ms``, if any is.
    """
    quick = [each for each in measured if max_latency_ms is None or each.point.latency_ms <= max_latency_ms]
    among = quick or [min(measured, key=lambda each: each.point.latency_ms)]
    enough = [each for each in among if each.point.recall >= target]
    if enough:
        fastest = min(each.point.latency_ms for each in enough)
        limit = max(HARDLY_MORE * fastest, fastest + HARDLY_MORE_MS)
        among = [each for each in enough if each.point.latency_ms <= limit]
    return max(among, key=lambda each: (each.point.recall, -each.point.latency_ms))


def pick(points: Sequence[OperatingPoint], *, recall: float | None = None, latency_ms: float | None = None) -> OperatingPoint:
    """The measured point for a wish: the fastest with that recall, or the one that finds most within that latency.

    Raises ConfigError, naming what there is, when none fits.
    """
    fitting = [point for point in points if recall is None or point.recall >= recall]
    if not fitting:
        most = max(point.recall for point in points)
        raise ConfigError(f"--recall {recall}: the measured settings of this artifact reach {most:.4f}; ask for less")
    if latency_ms is None:
        return min(fitting, key=lambda point: point.latency_ms)
    quick = [point for point in fitting if point.latency_ms <= latency_ms]
    if not quick:
        least = min(point.latency_ms for point in fitting)
        raise ConfigError(f"--latency {latency_ms:g}ms: the fastest measured setting takes {least:.2f} ms; allow more")
    return max(quick, key=lambda point: point.recall)


def _ladder(lists: int) -> list[int]:
    """Numbers of lists to visit: 1, 2, 3, 4, 6, 8, 12 and so on to all of them; 0 for an index without."""
    steps = {step for power in range(lists.bit_length()) for step in (1 << power, 3 << power) if step < lists}
    return [*sorted(steps), lists]


def _worthwhile(found: Sequence[tuple[int, int, Recall]], target: float) -> list[tuple[int, int, Recall]]:
    """Settings that no cheaper one equals, nearly: one that alone reaches the target is worth having for the least gain."""
    kept: list[tuple[int, int, Recall]] = []
    for lists, step, value in sorted(found, key=lambda each: each[:2]):
        rivals = [other.mean for lists_, step_, other in kept if lists_ <= lists and step_ <= step]
        best = max(rivals, default=-1.0)
        if value.mean >= best + ENOUGH_GAIN or best < target <= value.mean:
            kept.append((lists, step, value))
    return kept


class Scores:
    """Exact scores of candidates, each computed once: the candidates of one setting are mostly those of another.

    Takes 12 bytes per query and distinct candidate, and the time of one query's candidates after the other, which fit a cache.
    """

    def __init__(self, vectors: Vectors | Int8Vectors, queries: Matrix) -> None:
        self._vectors, self._queries = vectors, queries
        self._ordinals = [np.array([-1]) for _ in queries]
        self._scores = [np.array([-np.inf], dtype=np.float32) for _ in queries]

    def __call__(self, candidates: Ordinals) -> Matrix:
        """Float32 scores of (q, c) ordinals, those of a row distinct; -inf for ordinal -1."""
        found = np.empty(candidates.shape, dtype=np.float32)
        for row, wanted in enumerate(candidates):
            places = self._places(row, wanted)
            is_new = self._ordinals[row][places] != wanted
            if is_new.any():
                self._learn(row, wanted[is_new])
                places = self._places(row, wanted)
            found[row] = self._scores[row][places]
        return found

    def _places(self, row: int, wanted: Ordinals) -> Ordinals:
        return np.searchsorted(self._ordinals[row], wanted).clip(max=len(self._ordinals[row]) - 1)

    def _learn(self, row: int, fresh: Ordinals) -> None:
        ordinals = np.concatenate([self._ordinals[row], fresh])
        scores = np.concatenate([self._scores[row], gather(self._vectors, fresh) @ self._queries[row]])
        order = np.argsort(ordinals)
        self._ordinals[row], self._scores[row] = ordinals[order], scores[order]


def _recalls(
    collection: Collection, truth: Truth, exact: Scores | None, nprobe: int, steps: Sequence[int]
) -> list[tuple[int, Recall]]:
    """Recall of one nprobe for each depth of re-scoring, from one search."""
    k = truth.k if truth.own is None else truth.k + 1
    depth = min(width(k, max(steps)), max(1, len(collection.vectors)))
    scores, candidates = collection.index.search(truth.queries, depth, nprobe)
    if exact is not None and max(steps):
        scores = exact(candidates)
    recalls = []
    for step in steps:
        wide = width(k, step)
        found, ordinals = top(scores[:, :wide], candidates[:, :wide], k)
        if truth.own is not None:
            found, ordinals = drop_self(found, ordinals, truth.own, truth.k)
        recalls.append((step, recall(score(collection.vectors, truth.queries, ordinals), truth.scores)))
    return recalls


def _timed(collection: Collection, truth: Truth, nprobe: int, rescoring: int, found: Recall) -> Measured:
    times = []
    with one_thread():
        for query in truth.queries[:LATENCY_QUERIES]:
            started = time.perf_counter()
            collection.search(query[None, :], truth.k, nprobe=nprobe, rescoring=rescoring)
            times.append(time.perf_counter() - started)
    latency_ms = 1000 * float(np.median(times)) if times else 0.0
    return Measured(OperatingPoint(nprobe=nprobe, rescore=rescoring, recall=found.mean, latency_ms=latency_ms), found)
