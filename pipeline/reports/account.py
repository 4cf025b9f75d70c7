"""The account of an artifact: every number of its report, from the records and manifests that it was made from.

Nothing of the corpus itself is in it but counts and file names of the config. Memory is bounded: passages are read part by
part, four numbers of each.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from pydantic import Field

from pipeline.ann import drift
from pipeline.ann.drift import Measure, histogram
from pipeline.ann.index_plan import is_coded
from pipeline.embed.coverage import Coverage
from pipeline.ingest.snapshot import Part, parts, unit_records
from pipeline.operations.forecast import PLAN, Forecast
from pipeline.root import layout, retries
from pipeline.root.job import Job
from pipeline.root.log import Log
from pipeline.root.manifest import (
    ArtifactManifest,
    Document,
    Evaluation,
    Histogram,
    MergeRecord,
    Record,
    Values,
    list_records,
    load,
)
from pipeline.root.shards import is_among, keys_of, read_columns
from pipeline.root.storage import Storage

SPAN_COLUMNS = ("start", "end", "tokens", "truncated")
MAX_COUNTED_TOKENS = 1 << 16
"""Longer passages, of models without a limit, are counted as so long."""


class Lengths(Values):
    """How long passages are and how much of them the encoder sees. ``covered``: share of characters.

    What it sees of a truncated passage is estimated by the characters per token of the others; None where all are truncated.
    """

    tokens: Histogram
    longest: int
    median: int
    chars: int
    truncated: int
    covered: float | None


class Work(Values):
    """A stage: ``wall_s`` of the run that made the artifact; ``work_s``: what all that is in it took, in whichever run."""

    stage: str
    wall_s: float | None
    work_s: float | None
    phases_s: dict[str, float] = Field(default_factory=dict)
    amounts: dict[str, int] = Field(default_factory=dict)
    rates: dict[str, float] = Field(default_factory=dict)


class Expected(Values):
    """A number that was foretold, and what became of it."""

    name: str
    unit: str
    predicted: float | None
    actual: float | None


class Account(Document):
    """All that a report tells. ``counts``: those of the manifest; ``quarantine``: rows and passages left out, by code.

    ``retries``: requests to the store that the run had to make again until then.
    """

    artifact: str
    created: str
    counts: dict[str, int]
    input_files: int
    input_bytes: int
    lengths: Lengths
    work: tuple[Work, ...]
    evaluation: Evaluation
    target_recall: float
    min_recall: float
    verdict: str
    measures: tuple[Measure, ...]
    quarantine: dict[str, dict[str, int]]
    expected: tuple[Expected, ...]
    rate_source: str
    retries: int
    disk: dict[str, dict[str, int]]
    lineage: dict[str, Any]


def make_account(job: Job, coverage: Coverage, draft: ArtifactManifest, merged: MergeRecord) -> Account:
    """The account of an artifact in the making, whose manifest is not stored yet."""
    snapshot, storage = coverage.snapshot, job.storage
    units = list(chain.from_iterable(unit_records(storage, snapshot)))
    shards = [record for record in job.embedding_records() if record.unit in draft.records]
    coded = is_coded(draft.index.kind)
    made = list_records(storage, layout.index_shards(draft.index.trained)) if coded else {}
    codes = [record for unit, record in made.items() if unit in draft.records]
    forecast = load(Forecast, storage, layout.run(job.run_id, PLAN))
    rejected = Counter(_codes(storage, layout.SNAPSHOTS, [snapshot.rejected] if snapshot.rejected else []))
    rejected += Counter(_codes(storage, layout.PASSAGES, [record.rejected for record in units if record.rejected]))
    return Account(
        artifact=draft.version,
        created=draft.created,
        counts=draft.counts,
        input_files=len(snapshot.files),
        input_bytes=sum(file.size_bytes for file in snapshot.files),
        lengths=_lengths(storage, parts(storage, snapshot)),
        work=tuple(_work(job.stages_s, units, shards, codes, merged, draft)),
        evaluation=draft.evaluation,
        target_recall=job.config.index.target_recall,
        min_recall=job.config.publish.min_recall,
        verdict=draft.verdict,
        measures=tuple(drift.compare(draft.evaluation, draft.baseline, job.config)),
        quarantine={
            "rows": dict(sorted(rejected.items())),
            "passages": dict(sorted(_left_out(job, coverage).items())),
        },
        expected=tuple(_expected(job, forecast, draft, merged, shards)) if forecast else (),
        rate_source=forecast.rate_source if forecast else "",
        retries=retries.so_far(),
        disk={
            "artifact": {name: file.size_bytes for name, file in sorted(draft.files.items())},
            "store": {"passages": _bytes(units), "embeddings": _bytes(shards), "index shards": _bytes(codes)},
        },
        lineage=_lineage(job, draft, shards),
    )


def _lengths(storage: Storage, found: Iterable[Part]) -> Lengths:
    tokens = np.zeros(1, dtype=np.int64)
    sums = np.zeros((2, 3), dtype=np.int64)  # characters, tokens and passages of whole ones and of truncated ones
    for part in found:
        table = read_columns(storage, layout.PASSAGES, part.file, SPAN_COLUMNS)
        start, end, count, over = (np.delete(table.column(name).to_numpy(), part.masked) for name in SPAN_COLUMNS)
        counted = np.bincount(np.minimum(count, MAX_COUNTED_TOKENS), minlength=len(tokens))
        counted[: len(tokens)] += tokens
        tokens = counted
        for row, chosen in enumerate((~over, over)):
            sums[row] += [int((end - start)[chosen].sum()), int(count[chosen].sum()), int(chosen.sum())]
    (whole_chars, whole_tokens, _), (cut_chars, cut_tokens, truncated) = sums.tolist()
    chars = whole_chars + cut_chars
    covered: float | None = None
    if whole_tokens or not truncated:
        covered = (whole_chars + min(cut_chars, cut_tokens * whole_chars / max(1, whole_tokens))) / max(1, chars)
    median = int(np.searchsorted(np.cumsum(tokens), (tokens.sum() + 1) // 2))
    return Lengths(
        tokens=histogram(tokens), longest=len(tokens) - 1, median=median, chars=chars, truncated=truncated, covered=covered
    )


def _work(
    wall: dict[str, float], units: Sequence[Record], shards: Sequence[Record], codes: Sequence[Record], merged: MergeRecord,
    draft: ArtifactManifest,
) -> Iterable[Work]:  # fmt: skip
    trained, merge_s = draft.index.timings_s.get("total", 0.0), merged.timings_s
    rows = _sum(units, "rows", "passages", "tokens")
    yield _stage("ingest", wall, _seconds(units), rows, ("rows", "tokens"))
    yield _encoding(wall, shards)
    yield _stage("train", wall, {"total": trained}, {"vectors": draft.index.train_vectors}, ("vectors",))
    yield _stage("add", wall, _seconds(codes), _sum(codes, "vectors"), ("vectors",))
    phases = {"rows": merge_s["total"] - merge_s["index"], "index": merge_s["index"]}
    yield _stage("merge", wall, phases, {"passages": merged.counts["passages"]}, ("passages",))
    yield Work(stage="evaluate", wall_s=wall.get("evaluate"), work_s=None, amounts={"queries": draft.evaluation.queries})


def _encoding(wall: dict[str, float], shards: Sequence[Record]) -> Work:
    """Rates per second of encoding, of one encoder; shards that were compacted were not encoded as they are."""
    shards = [record for record in shards if "encode" in record.timings_s]
    phases, amounts = _seconds(shards), _sum(shards, "passages", "tokens", "padded_tokens", "rescued")
    rates = _rates(phases.get("encode", 0.0), amounts, "passages", "tokens")
    rates["padding"] = amounts["padded_tokens"] / max(1, amounts["tokens"]) - 1
    weighed = [(record.rates["mfu"], record.timings_s["encode"]) for record in shards if "mfu" in record.rates]
    if weighed:
        rates["mfu"] = sum(mfu * seconds for mfu, seconds in weighed) / sum(seconds for _, seconds in weighed)
    work_s = sum(phases.values())
    return Work(stage="embed", wall_s=wall.get("embed"), work_s=work_s, phases_s=phases, amounts=amounts, rates=rates)


def _stage(name: str, wall: dict[str, float], phases: dict[str, float], amounts: dict[str, int], rated: Sequence[str]) -> Work:
    work_s = sum(phases.values())
    rates = _rates(work_s, amounts, *rated)
    shown = phases if len(phases) > 1 else {}
    return Work(stage=name, wall_s=wall.get(name), work_s=work_s, phases_s=shown, amounts=amounts, rates=rates)


def _expected(
    job: Job, forecast: Forecast, draft: ArtifactManifest, merged: MergeRecord, shards: Sequence[Record]
) -> Iterable[Expected]:
    artifact = sum(file.size_bytes for file in draft.files.values())
    yield Expected(name="passages in the index", unit="", predicted=forecast.passages, actual=draft.counts["passages"])
    yield Expected(name="encoding, with its start", unit="s", predicted=forecast.encode_s, actual=job.stages_s.get("embed"))
    embeddings = sum(file.size_bytes for record in shards for file in record.files)
    yield Expected(name="embeddings", unit="B", predicted=forecast.embedding_bytes, actual=embeddings)
    yield Expected(name="index", unit="B", predicted=forecast.index_bytes, actual=draft.index_bytes)
    yield Expected(name="artifact", unit="B", predicted=forecast.artifact_bytes, actual=artifact)
    yield Expected(name="memory of the merge", unit="B", predicted=forecast.merge_memory_bytes, actual=merged.memory_bytes)


def _lineage(job: Job, draft: ArtifactManifest, shards: Sequence[Record]) -> dict[str, Any]:
    """Where the artifact comes from; like its manifest without credentials."""
    parent = Log(job.storage).refresh().live
    return {
        "parent": parent.artifact if parent else None,
        "parent_commit": parent.number if parent else None,
        "run": job.run_id,
        "snapshot": draft.snapshot,
        "trained": draft.index.trained,
        "index": draft.index.model_dump(mode="json", include={"kind", "why", "nlist", "m", "nbits", "opq", "factory"}),
        "encoder": draft.encoder,
        "machines": sorted({record.machine for record in shards if record.machine}),
        "versions": draft.versions,
        "config": draft.config,
    }


def _codes(storage: Storage, folder: str, files: Iterable[Any]) -> Iterable[str]:
    for file in files:
        yield from read_columns(storage, folder, file, ["code"]).column("code").to_pylist()


def _left_out(job: Job, coverage: Coverage) -> Counter[str]:
    """Passages without a vector by code; each once, whatever number of units it is rejected in."""
    found: dict[bytes, str] = {}
    for record in job.embedding_records() if len(coverage.left_out) else ():
        if record.rejected:
            table = read_columns(job.embeddings, job.embedding_folder, record.rejected, ["key", "code"])
            keys = keys_of(table.column("key"))
            codes = np.array(table.column("code").to_pylist())
            chosen = is_among(keys, coverage.left_out)
            found |= dict(zip(keys[chosen].tolist(), codes[chosen].tolist(), strict=True))
    return Counter(found.values())


def _sum(records: Sequence[Record], *names: str) -> dict[str, int]:
    return {name: sum(record.counts.get(name, 0) for record in records) for name in names}


def _seconds(records: Sequence[Record]) -> dict[str, float]:
    names = dict.fromkeys(name for record in records for name in record.timings_s)
    return {name: sum(record.timings_s.get(name, 0.0) for record in records) for name in names}


def _rates(seconds: float, amounts: dict[str, int], *names: str) -> dict[str, float]:
    return {name: amounts[name] / seconds for name in names} if seconds else {}


def _bytes(records: Sequence[Record]) -> int:
    files = ((*record.files, record.rejected, record.documents) for record in records)
    return sum(file.size_bytes for each in files for file in each if file)
