"""What a run is expected to take, noted before it encodes: ``runs/<run>/plan.json``. And what the past teaches about speed.

Nothing is read that the run would not read anyway but for a few records; what nobody has measured yet is left open.
"""

from dataclasses import dataclass

from pipeline.ann.index_plan import ID_BYTES, MERGE_COPIES, PACKED, IndexPlan, choose, index_bytes, is_coded
from pipeline.artifacts.key_merge import LIBRARY_BYTES, MORE_AHEAD_BYTES
from pipeline.config import Config
from pipeline.root import layout
from pipeline.root.job import Job
from pipeline.root.manifest import Document, Record, load, to_bytes
from pipeline.root.shards import AHEAD_BYTES, KEY_BYTES, ROW_GROUP_ROWS
from pipeline.root.storage import uri_scheme

PLAN = "plan.json"
RATE_RECORDS = 8
LOOKED_AT_RECORDS = 24
MIN_RATE_TOKENS = 10_000
"""Fewer tell how long an encoder takes to warm up."""

LEXICAL_TOKEN_BYTES = 2.6
"""Of a BM25 index for a token of the encoder's: 0.25 to 0.39 of them are new terms in their text (five corpora), of 8 bytes."""
METADATA_BYTES = 14
SHOWN_BYTES = 1.3
"""Of the documents of an artifact for a byte of them in Parquet: 1.1 with metadata, 1.4 without."""
PASSAGE_BYTES = 55
PLAIN_COPIES, PACKED_COPIES = 1.24, 2.0
"""Fitted to merges of 7,000 to 1,000,000 passages in 8 to 245 shards."""


@dataclass(frozen=True)
class Rate:
    """Tokens per second of one encoder, and how it is known."""

    tokens_per_s: float
    source: str


@dataclass(frozen=True)
class Ahead:
    """What lies before a run that knows its snapshot: ``to_encode`` of its passages have no vector yet.

    ``unit_passages``: of an embedding shard, at most.
    """

    passages: int
    tokens: int
    document_bytes: float
    to_encode: int
    encoders: int
    unit_passages: int
    machine: str | None


class Forecast(Document):
    """What the run was expected to make and take. ``encode_s``: None where this encoder left no record yet."""

    passages: int
    tokens: int
    to_encode: int
    encode_s: float | None
    rate_source: str
    embedding_bytes: int
    index_bytes: int
    artifact_bytes: int
    merge_memory_bytes: int


def learned_rate(job: Job, machine: str | None, phase: str = "encode") -> Rate | None:
    """The speed of this encoder in its newest records on a kind of machine; without ``machine`` on that of the newest.

    ``phase``: another of their timings, ``tokenize`` is by one core.
    """
    files = [file for file in job.embeddings.walk(job.embedding_folder) if file.path.endswith(".json")]
    used: list[Record] = []
    for file in sorted(files, key=lambda file: -file.modified_s)[:LOOKED_AT_RECORDS]:
        record = load(Record, job.embeddings, file.path)
        if record is None or record.machine is None or not record.timings_s.get(phase):
            continue
        machine = machine or record.machine
        if record.machine == machine and len(used) < RATE_RECORDS:
            used.append(record)
    tokens = sum(record.counts["tokens"] for record in used)
    if tokens < MIN_RATE_TOKENS:
        return None
    seconds = sum(record.timings_s[phase] for record in used)
    return Rate(tokens / seconds, f"the last {len(used)} embedding records of {machine}")


def sizes(config: Config, plan: IndexPlan, ahead: Ahead, dim: int) -> dict[str, int]:
    """Bytes on disk and in memory of what is made of a corpus."""
    vectors, rows = 2 * dim * ahead.passages, ahead.passages
    size = index_bytes(plan, ahead.passages, dim)
    words = LEXICAL_TOKEN_BYTES * ahead.tokens if config.index.lexical else 0.0
    columns = len(config.corpus.metadata)
    metadata = rows * (ID_BYTES + METADATA_BYTES * columns) if columns else 0
    rescored = vectors // 2 + 4 * rows if config.index.rescore == "int8" and is_coded(plan.kind) else 0
    return {
        "embedding_bytes": vectors + KEY_BYTES * rows,
        "artifact_bytes": round(vectors + rescored + size + SHOWN_BYTES * ahead.document_bytes + words + metadata),
        "index_bytes": size,
        "merge_memory_bytes": round(_merge_bytes(plan, ahead, dim, config)),
    }


def _merge_bytes(plan: IndexPlan, ahead: Ahead, dim: int, config: Config) -> float:
    """What a merge is expected to take: libraries, a row group of every shard, then an index file in the making."""
    passages, shard = ahead.passages, ahead.unit_passages
    size = index_bytes(plan, passages, dim)
    copies = PACKED_COPIES if plan.kind in PACKED else PLAIN_COPIES
    part = min(size, (config.compute.merge_memory - LIBRARY_BYTES) / MERGE_COPIES)
    rows = passages * min(ROW_GROUP_ROWS, shard) / shard
    groups = rows * (2 * dim + KEY_BYTES) + (size * rows / max(1, passages) if is_coded(plan.kind) else 0)
    if uri_scheme(config.root) != "file":
        files = (1 + is_coded(plan.kind)) * passages / shard
        groups = 2 * groups + AHEAD_BYTES * files
        stored, left = passages * (2 * dim + KEY_BYTES) + size, config.compute.merge_memory - LIBRARY_BYTES - groups
        groups += max(0, min(MORE_AHEAD_BYTES * files, stored, left / 2))
    return LIBRARY_BYTES + PASSAGE_BYTES * passages + max(groups, copies * part)


def put_forecast(job: Job, ahead: Ahead) -> Forecast:
    """Note what the run is expected to take. ``tokens``: of the passages to encode, as long as all are on average."""
    tokens = round(ahead.tokens * ahead.to_encode / max(1, ahead.passages))
    rate = learned_rate(job, ahead.machine) if tokens else Rate(1.0, "nothing to encode")
    plan = choose(job.config.index, ahead.passages, job.spec.dim)
    forecast = Forecast(
        passages=ahead.passages,
        tokens=tokens,
        to_encode=ahead.to_encode,
        encode_s=tokens / rate.tokens_per_s / ahead.encoders if rate else None,
        rate_source=rate.source if rate else "no record of this encoder on this kind of machine yet",
        **sizes(job.config, plan, ahead, job.spec.dim),
    )
    job.storage.put(layout.run(job.run_id, PLAN), to_bytes(forecast))
    return forecast
