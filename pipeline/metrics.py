"""Every metric that vecmill exports, as values: name, kind, help, labels, buckets. Imports nothing.

The service (``pipeline.operations.exposition``), the workers (``pipeline.stages.metering``), the dashboard and the alert rules
use these and no others. Labels hold only values of which there are few: stages, codes, phases; never an id or a query.
Ray puts ``ray_`` before the names of what workers and the driver of a run export.
"""

from dataclasses import dataclass
from typing import Literal

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
UNIT_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
TOKENS = (512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0, 65536.0, 131072.0)


@dataclass(frozen=True)
class Metric:
    """One metric; ``buckets``: upper bounds of a histogram."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


SEARCH_REQUESTS = Metric(
    "vecmill_search_requests_total", "counter", "Requests answered, by route and HTTP status", ("route", "code")
)
SEARCH_LATENCY = Metric(
    "vecmill_search_latency_seconds",
    "histogram",
    "Time of a request: queue (waiting for the encoder), encode, search (index, re-scoring, documents), total",
    ("phase",),
    SECONDS,
)
QUERY_BATCH = Metric("vecmill_query_batch_size", "histogram", "Texts that the query encoder took at once", (), SIZES)
QUEUE_DEPTH = Metric(
    "vecmill_queue_depth", "gauge", "What waits or is at work: texts for the encoder, searches for a thread", ("queue",)
)
DEGRADED = Metric("vecmill_degraded", "gauge", "1 while what is live cannot be served and an earlier artifact answers")
SWAPS = Metric("vecmill_swaps_total", "counter", "Commits that the service followed: switched or refused", ("result",))
INDEX_NTOTAL = Metric("vecmill_index_ntotal", "gauge", "Passages in the index")
INDEX_AGE = Metric("vecmill_index_age_seconds", "gauge", "Time since the served artifact was made")
RECALL = Metric("vecmill_recall", "gauge", "Recall@k that was measured for the artifact at its search setting")

ROWS = Metric("vecmill_rows_total", "counter", "Rows by stage and what became of them", ("stage", "status"))
QUARANTINED = Metric("vecmill_quarantined_total", "counter", "Rows and passages put aside, by reason", ("code",))
TOKENS_ENCODED = Metric("vecmill_tokens_total", "counter", "Tokens encoded, padding left out")
ENCODE_SECONDS = Metric("vecmill_encode_seconds", "histogram", "Time to encode a unit of passages", (), UNIT_SECONDS)
BATCH_TOKENS = Metric("vecmill_batch_tokens", "histogram", "Padded tokens per batch that an encoder chose", (), TOKENS)
BYTES_WRITTEN = Metric("vecmill_bytes_written_total", "counter", "Bytes of finished embedding shards")
ACTOR_RESTARTS = Metric("vecmill_actor_restarts_total", "counter", "Encoder actors that were started again after a death")
S3_RETRIES = Metric("vecmill_s3_retries_total", "counter", "Requests to the object store that were made again")
SHARDS_DONE = Metric("vecmill_shards_done", "gauge", "Work of a stage that is done: units, passages or shards", ("stage",))
SHARDS_PLANNED = Metric("vecmill_shards_planned", "gauge", "Work of a stage in all", ("stage",))
PUBLISHES = Metric("vecmill_publish_total", "counter", "Ends of a run: committed, unchanged, unpublished, failed", ("result",))

RUN_EXIT_CODE = Metric("vecmill_run_exit_code", "gauge", "Exit code of the last run, 0: it did its work")
RUN_TIME = Metric("vecmill_run_timestamp_seconds", "gauge", "When the last run ended, Unix time")
RUN_SECONDS = Metric("vecmill_run_seconds", "gauge", "How long the last run took")
RUN_ROWS = Metric("vecmill_run_rows", "gauge", "Rows of the last run's snapshot by what became of them", ("status",))
RUN_ENCODED = Metric("vecmill_run_encoded", "gauge", "Passages that the last run encoded")
RUN_RETRIES = Metric("vecmill_run_s3_retries", "gauge", "Requests to the object store that the last run made again")

SERVICE = (
    SEARCH_REQUESTS, SEARCH_LATENCY, QUERY_BATCH, QUEUE_DEPTH, DEGRADED, SWAPS, INDEX_NTOTAL, INDEX_AGE, RECALL,
)  # fmt: skip
WORKERS = (
    ROWS, QUARANTINED, TOKENS_ENCODED, ENCODE_SECONDS, BATCH_TOKENS, BYTES_WRITTEN, ACTOR_RESTARTS, S3_RETRIES, SHARDS_DONE,
    SHARDS_PLANNED, PUBLISHES, INDEX_NTOTAL, RECALL,
)  # fmt: skip
LAST_RUN = (RUN_EXIT_CODE, RUN_TIME, RUN_SECONDS, RUN_ROWS, RUN_ENCODED, RUN_RETRIES, INDEX_NTOTAL, RECALL)
"""What ``reindex --metrics-file`` writes."""
