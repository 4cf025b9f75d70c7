"""Embed on Ray Data: tokenize on CPU workers, encode on a pool of actors that write their own shards.

Only token ids travel through the object store; the actor that makes vectors writes them.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import ray.data

from pipeline.config import ComputeConfig
from pipeline.embed.anti_join import missing_passages, missing_rows
from pipeline.embed.embeddings import (
    MAX_UNIT_PASSAGES,
    EmbedUnit,
    even_size,
    plan_embedding,
    put_embeddings,
)
from pipeline.embed.tokenized import TokenizedUnit, tokenize_unit
from pipeline.encoding.model import EncoderSpec, find_model
from pipeline.encoding.numerics import machine_name
from pipeline.encoding.tokenizer import TextTokenizer
from pipeline.errors import VecmillError
from pipeline.ingest.snapshot import Part, ceiling, parts
from pipeline.operations.forecast import Ahead, put_forecast
from pipeline.root import retries
from pipeline.root.job import Event, Job, scratch, stage
from pipeline.root.manifest import Record, SnapshotManifest
from pipeline.root.shards import KEY_DTYPE
from pipeline.root.storage import Storage
from pipeline.stages import metering
from pipeline.stages.cluster import TOKENIZER_CPUS, Cluster, own_error, run_one, tolerant_rows
from pipeline.stages.pieces import DEATHS, Mortal, in_pieces

if TYPE_CHECKING:
    from pipeline.encoder import Encoded, Encoder

MIN_UNIT_PASSAGES = 512
UNITS_PER_ENCODER = 8
POOLED_TOKENS = 1024
"""Of a document of pooled windows, on average, up to which a unit has as many as it may."""
CALIBRATED_PASSAGES = 20_000
"""With fewer to encode, finding the best batch budget takes longer than it saves."""
CHECKED_TEXTS = 16
"""Texts of each unit that an int8 encoder compares with FP32."""
ACTOR_THREADS = 2
"""One encodes while the other writes what it encoded before."""
ACTOR_RESTARTS = 20
TASK_RETRIES = 1
"""Ray Data's default is to restart and to retry for ever, so a document that kills its process would never end the run."""
CRASHED = "E_CRASH: {} tokens, the process that encoded it alone died {} times"
LOST_UNITS_PER_ENCODER = 2 * ACTOR_THREADS
"""Units in flight when an encoder dies for good; more than that lost is not the fault of a document."""


@stage("embed")
def embed(job: Job, snapshot: SnapshotManifest, cluster: Cluster) -> int:
    """Encode what the store lacks of a snapshot; returns how many passages that were."""
    found = parts(job.storage, snapshot)
    passages = sum(part.rows for part in found)
    pooled_tokens = snapshot.counts["tokens"] if job.spec.window else 0
    most = unit_passages(job.config.compute, cluster, passages, pooled_tokens)
    units = _plan(job, found, most)
    total = sum(unit.passages for unit in units)
    machine = machine_name(cluster.threads(job.config.compute)) if cluster.nodes == 1 else None
    document_bytes = sum(part.file.size_bytes for part in found)
    encoders = cluster.encoders(job.config.compute)
    put_forecast(job, Ahead(passages, snapshot.counts["tokens"], document_bytes, total, encoders, most, machine))
    job.say(Event("embed", "", 0, total, {}))
    done = _run(job, cluster, units, total) if units else []
    done += _rescue(job, cluster, units, done) if len(done) < len(units) else []
    if (encoded := sum(record.counts["passages"] + record.counts["rejected"] for record in done)) != total:
        raise AssertionError(f"embed: {total} passages planned, {encoded} encoded or quarantined")
    there = f"{passages - total} were there or are duplicates"
    job.say(Event("embed", f"{total} passages encoded, {there}{_summary(done)}", total, total))
    return total


def _plan(job: Job, found: Sequence[Part], most: int) -> list[EmbedUnit]:
    """Units of at most about ``most`` passages over what the store lacks."""
    late, where = job.config.passages.late, (job.embeddings, job.embedding_folder, job.embedding_records())
    with scratch(job.config.compute.scratch) as folder:
        missing = missing_passages(job.storage, found, *where, scratch=folder)
    size = even_size(sum(int(mask.sum()) for mask in missing), most)
    return plan_embedding(missing_rows(job.storage, found, missing, late=late), size, late=late)


def unit_passages(compute: ComputeConfig, cluster: Cluster, passages: int, pooled_tokens: int) -> int:
    """Passages per embedding shard: as configured, else so that each encoder gets several units, within bounds.

    The more windows they are the means of, of ``pooled_tokens`` in all, the fewer: a unit's tokens are in memory.
    """
    length = max(1.0, pooled_tokens / max(1, passages) / POOLED_TOKENS)
    largest = max(1, int(MAX_UNIT_PASSAGES["gpu" if cluster.gpus_per_encoder(compute) else "cpu"] / length))
    share = -(-passages // (UNITS_PER_ENCODER * cluster.encoders(compute)))
    return compute.unit_passages or min(largest, max(MIN_UNIT_PASSAGES, share))


def _run(job: Job, cluster: Cluster, units: list[EmbedUnit], total: int) -> list[Record]:
    """Encode units. A few may be missing from what is returned: those whose process died, or whose work failed."""
    compute = job.config.compute
    rows = [{"unit": unit.model_dump_json()} for unit in units]
    threads = cluster.threads(compute)
    dataset = (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map(_tokenize_row, fn_args=(job.spec, job.storage), num_cpus=TOKENIZER_CPUS, max_retries=TASK_RETRIES)
        .map(
            EncoderActor,
            fn_constructor_args=(job.spec, job.embeddings, job.embedding_folder, threads, total >= CALIBRATED_PASSAGES),
            compute=ray.data.ActorPoolStrategy(
                size=min(cluster.encoders(compute), len(units)),
                max_tasks_in_flight_per_actor=2 * ACTOR_THREADS,
                max_concurrent_calls_per_actor=ACTOR_THREADS,
                enable_true_multi_threading=True,
            ),
            num_cpus=cluster.reserved_cpus(compute),
            num_gpus=cluster.gpus_per_encoder(compute) or None,
            max_restarts=ACTOR_RESTARTS,
            max_task_retries=TASK_RETRIES,
        )
    )
    records: list[Record] = []
    done = tokens = 0
    try:
        for row in tolerant_rows(dataset, LOST_UNITS_PER_ENCODER * cluster.encoders(compute)):
            records.append(record := Record.model_validate_json(row["record"]))
            retries.add(row["retries"])
            done, tokens = done + record.counts["passages"] + record.counts["rejected"], tokens + record.counts["tokens"]
            job.say(Event("embed", "", done, total, {"passages": done, "tokens": tokens}))
    except ray.exceptions.RayError as error:
        raise own_error(error) from error
    return records


def _rescue(job: Job, cluster: Cluster, units: list[EmbedUnit], done: list[Record]) -> list[Record]:
    """Encode the units that are missing one by one, each in pieces: what kills its process every time is quarantined."""
    compute, finished = job.config.compute, {record.unit for record in done}
    resources = {"num_cpus": cluster.reserved_cpus(compute), "num_gpus": cluster.gpus_per_encoder(compute)}
    actor = ray.remote(max_restarts=0, max_task_retries=0, **resources)(EncoderActor)
    arguments = (job.spec, job.embeddings, job.embedding_folder, cluster.threads(compute), False)
    encoder, records = Mortal(lambda: actor.remote(*arguments)), []
    most = ceiling(job.config.corpus, sum(unit.passages for unit in units))
    try:
        for unit in units:
            if unit.name not in finished:
                job.say(Event("embed", f"unit {unit.name} is encoded apart: its process died, or its work failed"))
                row = run_one(_tokenize_row, {"unit": unit.model_dump_json()}, job.spec, job.storage, cpus=TOKENIZER_CPUS)
                retries.add(row["retries"])
                tokenized = TokenizedUnit.of(row)
                encoded, draft = _encode_in_pieces(encoder, tokenized, job.spec.dim, most)
                where = (job.embeddings, job.embedding_folder, tokenized.keys)
                records.append(put_embeddings(*where, encoded.vectors, encoded.failed, draft))
                metering.embedded(records[-1], encoded.failed.values())
    finally:
        encoder.close()
    return records


def _encode_in_pieces(actor: Mortal, unit: TokenizedUnit, dim: int, most: int) -> tuple["Encoded", Record]:
    """What ``EncoderActor.encode`` gives for the whole unit; passages that kill their process are among the failed."""
    from pipeline.encoder import Encoded

    started, groups = time.perf_counter(), unit.together
    found = Encoded(np.full((len(unit.keys), dim), np.nan, dtype=np.float32))

    def passages(piece: range) -> list[int]:
        return [number for group in groups[piece.start : piece.stop] for number in group]

    for piece, answer in in_pieces(len(groups), lambda piece: actor.ask("encode", unit.piece(passages(piece)).as_row()), most):
        chosen = passages(piece)
        if answer is None:
            found.failed.update(dict.fromkeys(chosen, CRASHED.format(len(unit.piece(chosen).ids), DEATHS)))
        else:
            found = _joined(found, answer[0], chosen)
    counts = {"tokens": found.tokens, "padded_tokens": found.padded_tokens, "rescued": found.rescued}
    timings = unit.timings_s | {"encode": time.perf_counter() - started, "waiting": 0.0}
    return found, Record(unit=unit.name, files=(), counts=counts, timings_s=timings)


def _joined(found: "Encoded", encoded: "Encoded", passages: list[int]) -> "Encoded":
    found.vectors[passages] = encoded.vectors
    failed = found.failed | {passages[row]: reason for row, reason in encoded.failed.items()}
    sums = {name: getattr(found, name) + getattr(encoded, name) for name in ("tokens", "padded_tokens", "rescued")}
    return replace(found, failed=failed, **sums)


def _summary(records: list[Record]) -> str:
    """How well the encoders were used, for people."""
    if not records:
        return ""
    seconds = {name: sum(record.timings_s[name] for record in records) for name in ("encode", "waiting", "write")}
    tokens, padded = (sum(record.counts[name] for record in records) for name in ("tokens", "padded_tokens"))
    rescued = sum(record.counts["rescued"] for record in records)
    text = f"; {rescued} of them rescued" if rescued else ""
    text += f"; {tokens / max(seconds['encode'], 1e-9):,.0f} tokens/s per encoder, {padded / max(tokens, 1) - 1:.1%} padding"
    for name, label in (("mfu", "MFU {:.0%}"), ("cosine_mean", "cosine to fp32 {:.4f}"), ("cosine_min", "minimum {:.4f}")):
        values = [record.rates[name] for record in records if name in record.rates]
        if values:
            text += ", " + label.format(min(values) if name == "cosine_min" else sum(values) / len(values))
    return f"{text}, waiting {seconds['waiting'] / max(sum(seconds.values()), 1e-9):.0%}"


def _tokenize_row(row: dict[str, Any], spec: EncoderSpec, storage: Storage) -> dict[str, Any]:
    unit = EmbedUnit.model_validate_json(row["unit"])
    tokenized = tokenize_unit(unit, storage, _tokenizer(spec), spec)
    return {**tokenized.as_row(), "retries": retries.taken()}


@lru_cache(maxsize=2)
def _tokenizer(spec: EncoderSpec) -> TextTokenizer:
    return TextTokenizer(find_model(spec.model, spec.revision), spec.max_tokens, spec.prompts)


class EncoderActor:
    """One encoder on one GPU or one share of a node's cores."""

    def __init__(self, spec: EncoderSpec, storage: Storage, folder: str, threads: int, calibrate: bool) -> None:
        metering.actor_started()
        self._storage = storage
        self._encoder: Encoder | VecmillError
        try:
            self._encoder = self._load(spec, threads, calibrate)
        except VecmillError as error:  # raised by the first call: Ray keeps only the text of an error in a constructor
            self._encoder = error
        self._folder = folder
        self._alone = threading.Lock()
        self._peak = 0.0
        self._machine = machine_name(threads)
        self._idle_since = time.perf_counter()

    def _load(self, spec: EncoderSpec, threads: int, calibrate: bool) -> "Encoder":
        from pipeline.encoder import Encoder
        from pipeline.encoding.calibration import calibrate as tune_batches

        encoder = Encoder(spec, threads=threads)
        if calibrate:
            tune_batches(encoder)
        return encoder

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Encode one tokenized unit, write its shard and record; calls run side by side, but one encodes at a time."""
        encoded, draft = self.encode(row)
        keys = np.frombuffer(row["keys"], dtype=KEY_DTYPE)
        record = put_embeddings(self._storage, self._folder, keys, encoded.vectors, encoded.failed, draft)
        metering.embedded(record, encoded.failed.values())
        return {"record": record.model_dump_json(), "retries": row["retries"] + retries.taken()}

    def encode(self, row: dict[str, Any]) -> tuple["Encoded", Record]:
        """Vectors of a tokenized unit or of some of it, and a record in the making with what they took."""
        encoder = self._encoder
        if isinstance(encoder, VecmillError):
            raise encoder
        with self._alone:
            return self._encode(encoder, TokenizedUnit.of(row))

    def _encode(self, encoder: "Encoder", unit: TokenizedUnit) -> tuple["Encoded", Record]:
        prompt = encoder.spec.document_prompt
        started = time.perf_counter()
        if len(unit.spans):
            encoded = encoder.encode_spans(unit.tokens, unit.spans)
        else:
            encoded = encoder.encode_tokens(unit.tokens, prompt=prompt, windows=unit.windows)
        timings = {"waiting": started - self._idle_since, "encode": time.perf_counter() - started}
        rates = {}
        if encoder.flops_per_token:
            self._peak = self._peak or encoder.matmul_rate()  # not before: tokenizers crowd a start
            rates["mfu"] = encoded.tokens * encoder.flops_per_token / timings["encode"] / self._peak
        if encoder.spec.precision == "int8":
            began = time.perf_counter()
            checked = [
                row for row in range(0, len(unit.keys), -(-len(unit.keys) // CHECKED_TEXTS)) if row not in encoded.failed
            ]
            if checked:
                some = unit.piece(checked)
                cosine = encoder.cosine_to_exact(some.tokens, encoded.vectors[checked], prompt=prompt, windows=some.windows)
                rates |= {"cosine_mean": float(cosine.mean()), "cosine_min": float(cosine.min())}
            timings["check"] = time.perf_counter() - began
        self._idle_since = time.perf_counter()
        counts = {"tokens": encoded.tokens, "padded_tokens": encoded.padded_tokens, "rescued": encoded.rescued}
        counts["batch_tokens"] = encoder.batch_tokens
        timings = unit.timings_s | timings
        return encoded, Record(unit=unit.name, files=(), counts=counts, timings_s=timings, rates=rates, machine=self._machine)
