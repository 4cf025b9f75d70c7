"""How much of the exact answer an index finds: exact search, re-scoring, recall@k, operating points.

Recall compares an index with exact search over the same stored vectors, so it measures the index and nothing
else. Queries are passages chosen by the hash of their key (the same ones from run to run), kept out of
training but not out of the index; a passage never counts as its own neighbour.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.manifest import OperatingPoint
from pipeline.shards import Keys

Matrix = npt.NDArray[np.float32]
Ordinals = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float16]

BLOCK_ROWS = 1 << 15
QUERY_BLOCK = 1 << 9
GATHERED_FLOATS = 1 << 25
"""Memory of a step of exact search (64 MB of scores) and of re-scoring (128 MB of candidates)."""
TIE = 1e-6
"""Scores within this of the k-th exact score count as found: float32 sums differ in their last bits."""
MIN_GATED_PASSAGES = 100
LATENCY_QUERIES = 50
RESCORE_STEPS = (10, 30, 100)
"""Candidates re-scored per asked neighbour: 10 gave recall@10 0.93 where none gave 0.7 (PQ48x8, 299 k vectors, DESIGN)."""

Search = Callable[[Matrix, int, int, int], tuple[Matrix, Ordinals]]
"""(queries, k, nprobe, rescore) -> scores and ordinals, (q, k) each, -1 padded."""


def key_ranks(keys: Keys, seed: int) -> npt.NDArray[np.uint64]:
    """A uniform random number for each key, the same in every run: its first 8 bytes mixed with the seed (splitmix64)."""
    mixed = np.ascontiguousarray(keys).view(np.uint64).reshape(len(keys), -1)[:, 0] ^ np.uint64(
        seed * 0x9E3779B97F4A7C15 % (1 << 64)
    )
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)), dtype=np.uint64)


def held_out(keys: Keys, count: int, seed: int) -> Ordinals:
    """Ordinals of the passages used as queries: at most ``count`` and at most a tenth, but all of a tiny corpus."""
    limit = len(keys) if len(keys) < 10 * MIN_GATED_PASSAGES else min(count, len(keys) // 10)
    return _lowest(key_ranks(keys, seed), min(count, limit))


def training_sample(keys: Keys, count: int, seed: int, exclude: Ordinals) -> Ordinals:
    """Ordinals of a uniform sample of at most ``count`` passages; ``exclude`` is left out while enough others are there."""
    ranks = key_ranks(keys, seed + 1)
    if len(keys) - len(exclude) >= count:
        ranks[exclude] = np.iinfo(np.uint64).max
    return _lowest(ranks, min(count, len(keys)))


def _lowest(ranks: npt.NDArray[np.uint64], count: int) -> Ordinals:
    return np.sort(np.argsort(ranks, kind="stable")[:count]).astype(np.int64)


def exact_search(vectors: Vectors, queries: Matrix, k: int) -> tuple[Matrix, Ordinals]:
    """Brute force in float32 over (n, dim) float16 vectors: scores and ordinals, (q, min(k, n)), best first."""
    if len(queries) > QUERY_BLOCK:
        parts = [
            exact_search(vectors, queries[first : first + QUERY_BLOCK], k) for first in range(0, len(queries), QUERY_BLOCK)
        ]
        return np.concatenate([scores for scores, _ in parts]), np.concatenate([ordinals for _, ordinals in parts])
    best_scores = np.empty((len(queries), 0), dtype=np.float32)
    best = np.empty((len(queries), 0), dtype=np.int64)
    for first in range(0, len(vectors), BLOCK_ROWS):
        block = vectors[first : first + BLOCK_ROWS].astype(np.float32)
        fresh = np.broadcast_to(np.arange(first, first + len(block)), (len(queries), len(block)))
        scores, ordinals = top(queries @ block.T, fresh, k)
        best_scores, best = top(np.concatenate([best_scores, scores], axis=1), np.concatenate([best, ordinals], axis=1), k)
    return best_scores, best


def top(scores: Matrix, ordinals: Ordinals, k: int) -> tuple[Matrix, Ordinals]:
    """The k best columns of each row, best first."""
    if scores.shape[1] > k:
        kept = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        scores, ordinals = np.take_along_axis(scores, kept, 1), np.take_along_axis(ordinals, kept, 1)
    order = np.lexsort((ordinals, -scores), axis=1)
    return np.take_along_axis(scores, order, 1), np.take_along_axis(ordinals, order, 1)


def rescore(vectors: Vectors, queries: Matrix, candidates: Ordinals, k: int) -> tuple[Matrix, Ordinals]:
    """Exact float32 scores of candidate ordinals (q, c), -1 for none; the k best of each row."""
    scores = np.empty(candidates.shape, dtype=np.float32)
    step = max(1, GATHERED_FLOATS // max(1, candidates.shape[1] * queries.shape[1]))
    for first in range(0, len(queries), step):
        part = slice(first, first + step)
        gathered = vectors[np.maximum(candidates[part], 0)].astype(np.float32)
        scores[part] = np.einsum("qd,qcd->qc", queries[part], gathered)
    scores[candidates < 0] = -np.inf
    return top(scores, candidates, k)


@dataclass(frozen=True)
class Recall:
    """Mean recall@k over n queries with its 95 % interval (normal, from the spread between queries)."""

    mean: float
    low: float
    high: float
    queries: int


def recall(found_scores: Matrix, exact_scores: Matrix) -> Recall:
    """Share of the exact neighbours that were found.

    ``found_scores``: exact scores of what the index returned, -inf for none, (q, k); ``exact_scores``: of what
    exact search returned, (q, k). A found score within 1e-6 of the k-th exact one counts. No query: recall 1.
    """
    if not exact_scores.size:
        return Recall(1.0, 1.0, 1.0, 0)
    each = (found_scores >= exact_scores[:, -1:] - TIE).sum(axis=1) / exact_scores.shape[1]
    mean = float(np.minimum(each, 1).mean())
    half = 1.96 * float(each.std()) / math.sqrt(len(each))
    return Recall(mean, max(0.0, mean - half), min(1.0, mean + half), len(each))


def drop_self(scores: Matrix, ordinals: Ordinals, own: Ordinals, k: int) -> tuple[Matrix, Ordinals]:
    """Remove each query's own ordinal from (q, k + 1) results, or the last one where it is not among them."""
    keep = ordinals != own[:, None]
    keep[keep.all(axis=1), -1] = False
    width = ordinals.shape[1] - 1
    return scores[keep].reshape(len(own), width)[:, :k], ordinals[keep].reshape(len(own), width)[:, :k]


@dataclass(frozen=True)
class Truth:
    """Held-out queries and their exact answers. ``own``: each query's own ordinal, or None for queries from outside."""

    queries: Matrix
    scores: Matrix
    own: Ordinals | None
    k: int


def ground_truth(vectors: Vectors, queries: Matrix, own: Ordinals | None, k: int) -> Truth:
    """Exact answers for (q, dim) queries, without the queries themselves."""
    depth = k if own is None else k + 1
    scores, ordinals = exact_search(vectors, queries, depth)
    if own is not None:
        scores, ordinals = drop_self(scores, ordinals, own, k)
    return Truth(queries, scores, own, k)


def measure_point(search: Search, vectors: Vectors, truth: Truth, nprobe: int, rescoring: int) -> tuple[OperatingPoint, Recall]:
    """Recall over all queries, median latency over single ones."""
    depth = truth.k if truth.own is None else truth.k + 1
    scores, ordinals = search(truth.queries, depth, nprobe, rescoring)
    scores, ordinals = rescore(vectors, truth.queries, ordinals, depth)
    if truth.own is not None:
        scores, ordinals = drop_self(scores, ordinals, truth.own, truth.k)
    found = recall(scores, truth.scores)
    times = []
    for query in truth.queries[:LATENCY_QUERIES]:
        started = time.perf_counter()
        search(query[None, :], truth.k, nprobe, rescoring)
        times.append(time.perf_counter() - started)
    latency_ms = 1000 * float(np.median(times)) if times else 0.0
    return OperatingPoint(nprobe=nprobe, rescore=rescoring, recall=found.mean, latency_ms=latency_ms), found


def choose_point(
    search: Search, vectors: Vectors, truth: Truth, settings: Iterator[tuple[int, int]], target: float
) -> tuple[OperatingPoint, Recall, tuple[OperatingPoint, ...]]:
    """Measure settings (nprobe, rescore), cheap ones first, until one reaches ``target``; the best one if none does."""
    measured: list[tuple[OperatingPoint, Recall]] = []
    for nprobe, rescoring in settings:
        measured.append(measure_point(search, vectors, truth, nprobe, rescoring))
        if measured[-1][0].recall >= target:
            break
    point, found = max(measured, key=lambda pair: pair[0].recall)
    return point, found, tuple(point for point, _ in measured)


def settings_to_try(nlist: int) -> Iterator[tuple[int, int]]:
    """(nprobe, rescore) for an index of ``nlist`` lists, cheap ones first; (0, 0) for a flat index."""
    if nlist == 0:
        yield 0, 0
        return
    ladder = [1 << step for step in range(nlist.bit_length()) if 1 << step < nlist] + [nlist]
    for rescoring in RESCORE_STEPS:
        yield from ((nprobe, rescoring) for nprobe in ladder)
