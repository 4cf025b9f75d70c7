"""Ingest on Ray Data: plan units, run those whose record is missing, write the snapshot."""

import contextlib
import json
from functools import lru_cache
from typing import Any

import ray.data

from pipeline import errors
from pipeline.artifacts.live import live_snapshot
from pipeline.config import Config
from pipeline.encoding.model import EncoderSpec, find_model
from pipeline.encoding.tokenizer import TextTokenizer
from pipeline.errors import ProcessError, VecmillError, VerificationError
from pipeline.fingerprint import fingerprint
from pipeline.ingest.corpus import read_ids
from pipeline.ingest.documents import deleted_keys, resolve
from pipeline.ingest.ingestion import Place, document_places, ingest_unit, split_documents
from pipeline.ingest.passages import Splitter
from pipeline.ingest.quarantine import put_quarantine
from pipeline.ingest.snapshot import ceiling, check_quality, grown, put_snapshot, snapshot_name, unit_records
from pipeline.ingest.units import CorpusFiles, IngestUnit, deletes_config, follow, identify_files, limited, plan_units, reading
from pipeline.root import layout, retries
from pipeline.root.job import Event, Job, stage
from pipeline.root.manifest import Record, SnapshotManifest, load
from pipeline.root.shards import read_columns
from pipeline.root.storage import Storage
from pipeline.stages import metering
from pipeline.stages.cluster import own_error, tolerant_rows
from pipeline.stages.pieces import Mortal, in_pieces

SHOWN_IGNORED = 3
TASK_RETRIES = 1
"""Ray Data's default is for ever, so a file that kills its process would never end the run."""
LOST_UNITS = 8
"""More units whose process died are not the fault of a document."""


@stage("ingest")
def ingest(job: Job, limit: int | None = None) -> SnapshotManifest:
    """Bring the snapshot up to date; ``limit``: only so many documents. Raises DataError above the ceiling of bad rows."""
    config, earlier = job.config, None
    is_append = config.corpus.mode == "append"
    with contextlib.nullcontext() if is_append else contextlib.suppress(VerificationError):  # else it only saves hashing
        earlier = live_snapshot(job.storage)
    files = identify_files(config, earlier.files if earlier else ())
    read_by = fingerprint(reading(config, job.spec.space))
    chosen, generations = grown(files.chosen, earlier, read_by, config.corpus.uri) if is_append else (files.chosen, ())
    units = follow(plan_units(chosen, config, job.spec.space), earlier.files if earlier else (), config, job.spec.space)
    records = _limited_records(job, units, limit) if limit else _records(job, units)
    older = list(unit_records(job.storage, earlier)) if earlier and generations else []
    snapshot = _snapshot(
        job, [*older, *([records] if records else [])], files, earlier if generations else None, limit, read_by
    )
    check_quality(job.storage, snapshot, config, lambda: put_quarantine(job, snapshot))
    job.say(Event("ingest", _summary(snapshot.counts, files.ignored), len(units), len(units), snapshot.counts))
    return snapshot


def _snapshot(
    job: Job, generations: list[list[Record]], files: CorpusFiles, earlier: SnapshotManifest | None, limit: int | None,
    read_by: str,
) -> SnapshotManifest:  # fmt: skip
    """The snapshot of these units: known already, or found out which of their documents count."""
    corpus = job.config.corpus
    deletes = identify_files(deletes_config(job.config)) if corpus.deletes else None
    deletes_name = fingerprint([file.content for file, _ in deletes.chosen]) if deletes else None
    names = [[record.unit for record in generation] for generation in generations]
    name = snapshot_name(names, limit, deletes_name, corpus.mode)
    if (known := load(SnapshotManifest, job.storage, layout.snapshot(name))) is not None:
        return known
    keys = deleted_keys(read_ids(deletes.chosen, corpus, job.config.store) if deletes else ())
    found = resolve(job.storage, generations, keys, appended=corpus.mode == "append")
    listed = {
        (file.uri, file.content): file for file in (*(earlier.files if earlier else ()), *(file for file, _ in files.chosen))
    }
    return put_snapshot(job.storage, name, list(listed.values()), generations, found, limit, read_by)


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
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _ingest_row, fn_args=arguments, num_cpus=1, max_retries=TASK_RETRIES
    )
    records: list[Record] = []

    def take(record: Record) -> None:
        records.append(record)
        counts = {name: sum(each.counts[name] for each in records) for name in ("rows", "passages", "tokens")}
        job.say(Event("ingest", "", len(records), len(units), counts))

    try:
        for row in tolerant_rows(dataset, LOST_UNITS):
            retries.add(row["retries"])
            take(_record_of(row))
    except ray.exceptions.RayError as error:
        raise own_error(error) from error
    finished = {record.unit for record in records}
    for unit in units:
        if unit.name not in finished:
            job.say(Event("ingest", f"unit {unit.name} is read apart: its process died, or its work failed"))
            take(_read_apart(job, unit))
    return records


def _read_apart(job: Job, unit: IngestUnit) -> Record:
    """Read a unit by a process of its own: rows and files that kill it every time are put aside."""
    actor = ray.remote(num_cpus=1, max_restarts=0, max_task_retries=0)(UnitReader)
    reader = Mortal(lambda: actor.remote(job.config, job.spec, job.storage))
    try:
        found = reader.ask("read", unit, frozenset()) or reader.ask("read", unit, _deadly(job, reader, unit))
    finally:
        reader.close()
    if found is None:
        raise ProcessError(f"unit {unit.name}: its process died too often; look for lack of memory, then run again")
    retries.add(found[1])
    record: Record = found[0]
    return record


def _deadly(job: Job, reader: Mortal, unit: IngestUnit) -> frozenset[Place]:
    """Documents that a process dies of when it splits them, and files (no row) that it dies of when it reads them."""
    corpus, deadly = job.config.corpus, set()
    places: list[Place] = []
    files = in_pieces(len(unit.slices), lambda piece: reader.ask("places", unit, piece), corpus.max_bad_rows)
    for number, found in files:
        places += found or ()
        deadly |= {(unit.slices[number.start].uri, None)} if found is None else set()
    most = ceiling(corpus, len(places))
    splits = in_pieces(len(places), lambda piece: reader.ask("split", unit, places[piece.start : piece.stop]), most)
    return frozenset(deadly | {places[piece.start] for piece, found in splits if found is None})


def _limited_records(job: Job, units: list[IngestUnit], limit: int) -> list[Record]:
    """Units one after the other, each cut to what is still wanted, until there are ``limit`` documents."""
    records: list[Record] = []
    for unit in units:
        left = limit - sum(record.counts["documents"] for record in records)
        if left <= 0:
            break
        records += _records(job, [limited(unit, left, job.config, job.spec.space)])
    return records


def _ingest_row(row: dict[str, Any], config: Config, spec: EncoderSpec, storage: Storage) -> dict[str, Any]:
    """An error of ours is a row too: those that Ray raises are taken for deaths, and told at the end."""
    unit = IngestUnit.model_validate_json(row["unit"])
    record = kind = text = ""
    try:
        record = _ingested(unit, config, spec, storage).model_dump_json()
    except VecmillError as error:
        kind, text = type(error).__name__, str(error)
    return {"record": record, "kind": kind, "error": text, "retries": retries.taken()}


def _ingested(
    unit: IngestUnit, config: Config, spec: EncoderSpec, storage: Storage, deadly: frozenset[Place] = frozenset()
) -> Record:
    record = ingest_unit(unit, config, _splitter(spec, config.passages.model_dump_json()), storage, deadly)
    rejected = read_columns(storage, layout.PASSAGES, record.rejected, ("code",)) if record.rejected else None
    metering.ingested(record, rejected.column("code").to_pylist() if rejected else ())
    return record


def _record_of(row: dict[str, Any]) -> Record:
    if row["error"]:
        raise getattr(errors, row["kind"])(row["error"])
    return Record.model_validate_json(row["record"])


class UnitReader:
    """A process that reads a unit which another one died of."""

    def __init__(self, config: Config, spec: EncoderSpec, storage: Storage) -> None:
        self._config, self._spec, self._storage = config, spec, storage

    def read(self, unit: IngestUnit, deadly: frozenset[Place]) -> tuple[Record, int]:
        """Ingest it without the documents and files in ``deadly``; the record, and how many requests were made again."""
        return _ingested(unit, self._config, self._spec, self._storage, deadly), retries.taken()

    def places(self, unit: IngestUnit, numbers: range) -> list[Place]:
        """Where the documents of these slices are."""
        return [place for number in numbers for place in document_places(unit.slices[number], self._config)]

    def split(self, unit: IngestUnit, wanted: list[Place]) -> bool:
        """Split these documents; True for having outlived it."""
        splitter = _splitter(self._spec, self._config.passages.model_dump_json())
        split_documents(unit, self._config, splitter, frozenset(wanted))
        return True


@lru_cache(maxsize=2)
def _splitter(spec: EncoderSpec, passages: str) -> Splitter:
    """One tokenizer per worker process and setting."""
    from pipeline.config_what import PassagesConfig

    tokenizer = TextTokenizer(find_model(spec.model, spec.revision), spec.max_tokens, spec.prompts)
    return Splitter(tokenizer, PassagesConfig(**json.loads(passages)), spec.document_prompt)


def _summary(counts: dict[str, int], ignored: tuple[str, ...]) -> str:
    fates = ("rejected", "duplicates", "replaced", "deleted")
    settled = [f"{counts[name]} {name}" for name in fates if counts.get(name) or name == "rejected"]
    rows = f"{counts['rows']} rows = {' + '.join([str(counts['documents']) + ' documents', *settled])}"
    notes = [f"{counts[name]} documents {name}" for name in ("split", "truncated", "sparse") if counts[name]]
    if counts.get("prompted"):
        notes.append(
            f"{counts['prompted']} documents begin with encoder.document_prompt already, which then stands there twice"
        )
    if counts["skipped_files"]:
        notes.append(f"{counts['skipped_files']} files skipped")
    if ignored:
        shown = ", ".join(uri.rpartition("/")[2] for uri in ignored[:SHOWN_IGNORED])
        notes.append(f"{len(ignored)} files ignored ({shown}{', ...' if len(ignored) > SHOWN_IGNORED else ''})")
    return ", ".join([rows, f"{counts['passages']} passages", *notes])
