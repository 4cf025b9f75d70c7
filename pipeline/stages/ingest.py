"""Ingest on Ray Data: plan units, run those whose record is missing, write the snapshot."""

import json
from functools import lru_cache
from typing import Any

import ray.data

from pipeline import layout
from pipeline.config import Config
from pipeline.job import Event, Job
from pipeline.manifest import Record, SnapshotManifest, load, to_bytes
from pipeline.model import EncoderSpec, find_model
from pipeline.passages import Splitter
from pipeline.snapshot import (
    IngestUnit,
    build_snapshot,
    check_quality,
    identify_files,
    ingest_unit,
    known_files,
    limited,
    plan_units,
)
from pipeline.stages.cluster import own_error
from pipeline.storage import Storage
from pipeline.tokenizer import TextTokenizer


def ingest(job: Job, limit: int | None = None) -> SnapshotManifest:
    """Bring the snapshot up to date; ``limit``: only so many documents. Raises DataError above the ceiling of bad rows."""
    files = identify_files(job.config, known_files(job.storage))
    units = plan_units(files, job.config, job.spec.space)
    records = _limited_records(job, units, limit) if limit else _records(job, units)
    snapshot = build_snapshot([file for file, _ in files], records, limit)
    check_quality(snapshot, job.config, job.storage.uri)
    job.storage.create(layout.snapshot(snapshot.snapshot), to_bytes(snapshot))
    counts = snapshot.counts
    job.say(Event("ingest", _summary(counts), len(units), len(units), counts))
    return snapshot


def _records(job: Job, units: list[IngestUnit]) -> list[Record]:
    found = (load(Record, job.storage, layout.ingest_record(unit.name)) for unit in units)
    records = [record for record in found if record is not None]
    finished = {record.unit for record in records}
    missing = [unit for unit in units if unit.name not in finished]
    return records + (_run(job, missing) if missing else [])


def _run(job: Job, units: list[IngestUnit]) -> list[Record]:
    job.say(Event("ingest", "", 0, len(units), {}))
    rows = [{"unit": unit.model_dump_json()} for unit in units]
    arguments = (job.config, job.spec, job.storage)
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(_ingest_row, fn_args=arguments, num_cpus=1)
    records: list[Record] = []
    try:
        for row in dataset.iter_rows():
            records.append(Record.model_validate_json(row["record"]))
            counts = {name: sum(record.counts[name] for record in records) for name in ("rows", "passages", "tokens")}
            job.say(Event("ingest", "", len(records), len(units), counts))
    except ray.exceptions.RayError as error:
        raise own_error(error) from error
    return records


def _limited_records(job: Job, units: list[IngestUnit], limit: int) -> list[Record]:
    """Units one after the other, each cut to what is still wanted, until there are ``limit`` documents."""
    records: list[Record] = []
    for unit in units:
        left = limit - sum(record.counts["documents"] for record in records)
        if left <= 0:
            break
        records += _records(job, [limited(unit, left, job.config, job.spec.space)])
    return records


def _ingest_row(row: dict[str, Any], config: Config, spec: EncoderSpec, storage: Storage) -> dict[str, str]:
    unit = IngestUnit.model_validate_json(row["unit"])
    splitter = _splitter(spec, config.passages.model_dump_json())
    return {"record": ingest_unit(unit, config, splitter, storage).model_dump_json()}


@lru_cache(maxsize=2)
def _splitter(spec: EncoderSpec, passages: str) -> Splitter:
    """One tokenizer per worker process and setting."""
    from pipeline.config import PassagesConfig

    tokenizer = TextTokenizer(find_model(spec.model, spec.revision), spec.max_tokens)
    return Splitter(tokenizer, PassagesConfig(**json.loads(passages)), spec.document_prompt)


def _summary(counts: dict[str, int]) -> str:
    rows = f"{counts['rows']} rows = {counts['documents']} documents + {counts['rejected']} rejected"
    notes = [f"{counts[name]} documents {name}" for name in ("split", "truncated") if counts[name]]
    return ", ".join([rows, f"{counts['passages']} passages", *notes])
