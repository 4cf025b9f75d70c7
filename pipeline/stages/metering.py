"""The metrics of workers and of the driver of a run, exported by Ray on each node with ``ray_`` before their names."""

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import ray
from ray.util import metrics as exported

from pipeline.metrics import (
    ACTOR_RESTARTS,
    BATCH_TOKENS,
    BYTES_WRITTEN,
    ENCODE_SECONDS,
    INDEX_NTOTAL,
    PUBLISHES,
    QUARANTINED,
    RECALL,
    ROWS,
    S3_RETRIES,
    SHARDS_DONE,
    SHARDS_PLANNED,
    TOKENS_ENCODED,
    Metric,
)
from pipeline.root.job import Event, Say
from pipeline.root.manifest import ArtifactManifest, Record


def count(metric: Metric, amount: float = 1, **labels: str) -> None:
    """Add to a counter; nothing is added for nothing."""
    if amount > 0:
        _instrument(metric).inc(amount, tags=labels)


def observe(metric: Metric, value: float, **labels: str) -> None:
    """Record a value in a histogram."""
    _instrument(metric).observe(value, tags=labels)


def level(metric: Metric, value: float, **labels: str) -> None:
    """Set a gauge."""
    _instrument(metric).set(value, tags=labels)


def ingested(record: Record, codes: Iterable[str]) -> None:
    """Count the rows of an ingest unit; ``codes``: of its rejected ones."""
    for status in ("documents", "rejected"):
        count(ROWS, record.counts[status], stage="ingest", status=status)
    for code, rows in Counter(codes).items():
        count(QUARANTINED, rows, code=code)


def embedded(record: Record, failed: Iterable[str]) -> None:
    """Count the passages of an embedding shard and what it took; ``failed``: why some have no vector, ``<code>: <reason>``."""
    count(ROWS, record.counts["passages"], stage="embed", status="encoded")
    count(ROWS, record.counts["rejected"], stage="embed", status="rejected")
    for code, rows in Counter(reason.partition(":")[0] for reason in failed).items():
        count(QUARANTINED, rows, code=code)
    count(TOKENS_ENCODED, record.counts["tokens"])
    count(BYTES_WRITTEN, sum(file.size_bytes for file in record.files))
    observe(ENCODE_SECONDS, record.timings_s["encode"])
    if "batch_tokens" in record.counts:
        observe(BATCH_TOKENS, record.counts["batch_tokens"])


def ended(result: str, live: ArtifactManifest | None = None, retries: int = 0) -> None:
    """Count the end of a run, and tell what is live after it."""
    count(PUBLISHES, result=result)
    count(S3_RETRIES, retries)
    if live is not None:
        level(INDEX_NTOTAL, live.counts["passages"])
        level(RECALL, live.evaluation.recall)


def actor_started() -> None:
    """Count the actor that calls, if it is not its first start."""
    if ray.get_runtime_context().was_current_actor_reconstructed:
        count(ACTOR_RESTARTS)


def watched(say: Say) -> Say:
    """The same way to tell events, with the progress of stages in gauges."""

    def tell(event: Event) -> None:
        if event.total:
            level(SHARDS_DONE, event.done, stage=event.stage)
            level(SHARDS_PLANNED, event.total, stage=event.stage)
        say(event)

    return tell


@lru_cache(maxsize=64)
def _instrument(metric: Metric) -> Any:
    if metric.kind == "histogram":
        return exported.Histogram(metric.name, metric.help, list(metric.buckets), metric.labels)
    kind = exported.Counter if metric.kind == "counter" else exported.Gauge
    return kind(metric.name, metric.help, metric.labels)
