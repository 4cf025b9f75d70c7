"""Artifacts against each other on the same judged queries: metrics, what chance explains of a difference, time, bytes.

The first is what the others are held against. A difference is tested by a paired randomization test (two-sided, Smucker et al.
2007): how often would flipping the sign of each query's difference at random make the mean so far from zero?
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.client import Artifact, open_artifact, open_root
from pipeline.config import StoreConfig
from pipeline.config_file import load_config
from pipeline.errors import ConfigError
from pipeline.root.manifest import Values
from pipeline.search.evaluation import LABELLED_DEPTH, ranked_documents
from pipeline.search.judgements import QRELS_METRICS, chosen_queries, metrics_by_query, read_qrels
from pipeline.search.searcher import Mode

PERMUTATIONS = 20_000
PERMUTED_AT_ONCE = 1000
SEED = 1234
TIMED_QUERIES = 100
"""Queries that are timed one at a time; all of them are judged."""
SHOWN_QUERIES = 5
CONFIG_ENDINGS = {".yaml", ".yml"}


class Compared(Values):
    """One artifact. ``metrics``: means over the queries; ``p50_ms``: one query at a time with its encoding."""

    name: str
    artifact: str
    model: str
    documents: int
    passages: int
    dim: int
    bytes_per_vector: float
    artifact_bytes: int
    reranked: bool
    metrics: dict[str, float]
    p50_ms: float


class QueryChange(Values):
    """A query that one artifact answers better or worse than the first."""

    query: str
    text: str
    before: float
    after: float


class Difference(Values):
    """An artifact against the first, by one metric. ``p``: how often chance alone does as much; wins, losses, ties: queries."""

    name: str
    metric: str
    mean: float
    p: float
    wins: int
    losses: int
    ties: int
    most_better: tuple[QueryChange, ...] = ()
    most_worse: tuple[QueryChange, ...] = ()


class Comparison(Values):
    """What was found. ``differences``: of every artifact but the first, by every metric."""

    queries: int
    mode: str
    artifacts: tuple[Compared, ...]
    differences: tuple[Difference, ...]


def compare(
    targets: Sequence[str], queries: str, qrels: str, *, mode: Mode | None = None, rerank: bool = False,
    overrides: Sequence[str] = (),
) -> Comparison:  # fmt: skip
    """``targets``: config files (their live artifacts) or URIs of artifact folders, two or more. ``overrides``: for configs.

    ``rerank``: those whose config names a re-ranker.

    Raises ConfigError where a target, the queries or their judgements are not there.
    """
    if len(targets) < 2:
        raise ConfigError("compare: give two or more config files or artifact URIs")
    opened = [_open(target, overrides) for target in targets]
    if rerank and not any(artifact.has_reranker for artifact, _ in opened):
        raise ConfigError("compare: none of the configs names a search.reranker")
    store = opened[0][1]
    judgements = read_qrels(qrels, store)
    texts = chosen_queries(queries, store, judgements.keys())
    judgements = {name: judgements[name] for name in texts}
    found, scores = [], []
    for target, (artifact, _) in zip(targets, opened, strict=True):
        compared, by_query = _judge(target, artifact, texts, judgements, mode, rerank=rerank)
        found.append(compared)
        scores.append(by_query)
    differences = [
        _difference(compared.name, metric, texts, scores[0][metric], by_query[metric])
        for compared, by_query in zip(found[1:], scores[1:], strict=True)
        for metric in QRELS_METRICS
    ]
    return Comparison(
        queries=len(texts),
        mode=mode or "as configured",
        artifacts=tuple(found),
        differences=tuple(differences),
    )


def _open(target: str, overrides: Sequence[str]) -> tuple[Artifact, StoreConfig]:
    if Path(target).suffix in CONFIG_ENDINGS:
        config = load_config(target, tuple(overrides))
        return open_root(config), config.store
    return open_artifact(target), StoreConfig()


def _judge(
    name: str, artifact: Artifact, texts: Mapping[str, str], judgements: Mapping[str, Mapping[str, int]], mode: Mode | None, *,
    rerank: bool,
) -> tuple[Compared, dict[str, dict[str, float]]]:  # fmt: skip
    ranked, seconds = {}, []
    rerank = rerank and artifact.has_reranker
    artifact.texts([next(iter(texts.values()))], LABELLED_DEPTH, mode=mode, rerank=rerank)  # loads the models
    for query, text in texts.items():
        started = time.perf_counter()
        (answer,) = artifact.texts([text], LABELLED_DEPTH, mode=mode, rerank=rerank)
        seconds.append(time.perf_counter() - started)
        ranked[query] = ranked_documents(answer)
    by_query = metrics_by_query(judgements, ranked)
    manifest = artifact.opened.manifest
    compared = Compared(
        name=name,
        artifact=manifest.version,
        model=str(manifest.encoder["model"]),
        documents=manifest.counts["documents"],
        passages=manifest.counts["passages"],
        dim=manifest.dim,
        bytes_per_vector=manifest.bytes_per_vector,
        artifact_bytes=sum(file.size_bytes for file in manifest.files.values()),
        reranked=rerank,
        metrics={metric: round(statistics.fmean(values.values()), 4) for metric, values in by_query.items()},
        p50_ms=round(1000 * statistics.median(seconds[:TIMED_QUERIES]), 2),
    )
    return compared, by_query


def _difference(
    name: str, metric: str, texts: Mapping[str, str], before: Mapping[str, float], after: Mapping[str, float]
) -> Difference:
    changes = np.array([after[query] - before[query] for query in texts])
    order = np.argsort(-changes, kind="stable")
    names = list(texts)

    def shown(rows: npt.NDArray[np.int64]) -> tuple[QueryChange, ...]:
        chosen = [names[row] for row in rows]
        return tuple(QueryChange(query=each, text=texts[each], before=before[each], after=after[each]) for each in chosen)

    wins, losses = int((changes > 0).sum()), int((changes < 0).sum())
    return Difference(
        name=name,
        metric=metric,
        mean=round(float(changes.mean()), 4),
        p=round(randomization_test(changes), 5),
        wins=wins,
        losses=losses,
        ties=len(changes) - wins - losses,
        most_better=shown(order[: min(SHOWN_QUERIES, wins)]),
        most_worse=shown(order[::-1][: min(SHOWN_QUERIES, losses)]),
    )


def randomization_test(changes: npt.NDArray[np.float64]) -> float:
    """Two-sided p of paired differences (n,): the share of sign flips whose mean is as far from 0, itself counted as one."""
    rng = np.random.default_rng(SEED)
    observed = abs(changes.sum()) - 1e-12
    extreme = 0
    for _ in range(PERMUTATIONS // PERMUTED_AT_ONCE):
        signs = rng.integers(0, 2, size=(PERMUTED_AT_ONCE, len(changes))) * 2 - 1
        extreme += int((np.abs(signs @ changes) >= observed).sum())
    return (extreme + 1) / (PERMUTATIONS + 1)
