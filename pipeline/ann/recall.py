"""How much of the exact answer an index finds: exact search, re-scoring, recall@k.

Recall compares an index with exact search over the same stored vectors, so it measures the index and nothing
else. Queries are passages chosen by the hash of their key (the same ones from run to run), kept out of
training but not out of the index; a passage never counts as its own neighbour.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.ann.vectors import Int8Vectors, Vectors, gather, to_float32
from pipeline.root.shards import Keys

Matrix = npt.NDArray[np.float32]
Ordinals = npt.NDArray[np.int64]

BLOCK_ROWS = 1 << 15
QUERY_BLOCK = 1 << 9
GATHERED_FLOATS = 1 << 25
"""Memory of a step of exact search (64 MB of scores) and of re-scoring (128 MB of candidates)."""
TIE = 1e-6
"""Scores within this of the k-th exact score count as found: float32 sums differ in their last bits."""
MIN_GATED_PASSAGES = 100
MIN_HELD_OUT_PASSAGES = 1000
"""In a smaller corpus every passage is both a query and trained on."""


def key_ranks(keys: Keys, seed: int) -> npt.NDArray[np.uint64]:
    """A uniform random number for each key, the same in every run: its last 8 bytes mixed with the seed (splitmix64).

    The first are those of a context, whose passages are much alike.
    """
    mixed = np.ascontiguousarray(keys).view(np.uint64).reshape(len(keys), -1)[:, 1] ^ np.uint64(
        seed * 0x9E3779B97F4A7C15 % (1 << 64)
    )
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)), dtype=np.uint64)


def held_out(keys: Keys, count: int, seed: int) -> Ordinals:
    """Ordinals of the passages used as queries: at most ``count`` and at most a tenth, but all of a tiny corpus."""
    limit = len(keys) if len(keys) < MIN_HELD_OUT_PASSAGES else min(count, len(keys) // 10)
    return _lowest(key_ranks(keys, seed), min(count, limit))


def training_sample(keys: Keys, count: int, seed: int, exclude: Ordinals) -> Ordinals:
    """Ordinals of a uniform sample of at most ``count`` passages; ``exclude`` is left out but in a tiny corpus."""
    ranks = key_ranks(keys, seed + 1)
    if len(keys) >= MIN_HELD_OUT_PASSAGES:
        ranks[exclude] = np.iinfo(np.uint64).max
        count = min(count, len(keys) - len(exclude))
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
        block = to_float32(vectors[first : first + BLOCK_ROWS])
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


def score(vectors: Vectors | Int8Vectors, queries: Matrix, candidates: Ordinals) -> Matrix:
    """Float32 scores of candidate ordinals by their stored vectors, (q, c); -inf for ordinal -1."""
    scores = np.empty(candidates.shape, dtype=np.float32)
    step = max(1, GATHERED_FLOATS // max(1, candidates.shape[1] * queries.shape[1]))
    for first in range(0, len(queries), step):
        part = slice(first, first + step)
        gathered = gather(vectors, np.maximum(candidates[part], 0))
        scores[part] = np.matmul(gathered, queries[part][:, :, None])[..., 0]
    scores[candidates < 0] = -np.inf
    return scores


def rescore(vectors: Vectors | Int8Vectors, queries: Matrix, candidates: Ordinals, k: int) -> tuple[Matrix, Ordinals]:
    """``score`` of candidate ordinals (q, c), -1 for none; the k best of each row."""
    return top(score(vectors, queries, candidates), candidates, k)


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
