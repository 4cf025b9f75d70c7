"""Embed on Ray Data: tokenize on CPU workers, encode on a pool of actors that write their own shards.

Only token ids travel through the object store; the actor that makes vectors writes them.
"""

import time
from functools import lru_cache
from typing import Any

import numpy as np
import ray.data

from pipeline import layout
from pipeline.config import ComputeConfig
from pipeline.embeddings import (
    EmbedUnit,
    is_among,
    plan_embedding,
    put_embeddings,
    quarantined_keys,
    stored_keys,
    tokenize_unit,
)
from pipeline.errors import DataError, VecmillError
from pipeline.job import Event, Job
from pipeline.manifest import Record, SnapshotManifest
from pipeline.model import EncoderSpec, find_model
from pipeline.shards import KEY_DTYPE, Keys, read_keys
from pipeline.snapshot import parts
from pipeline.stages.cluster import TOKENIZER_CPUS, Cluster, own_error
from pipeline.storage import Storage
from pipeline.tokenizer import TextTokenizer

MAX_UNIT_PASSAGES = {"cpu": 4096, "gpu": 32768}
"""A unit is what a crash repeats: some ten seconds of work."""
MIN_UNIT_PASSAGES = 512
UNITS_PER_ENCODER = 8
CALIBRATED_PASSAGES = 20_000
"""With fewer to encode, finding the best batch budget takes longer than it saves."""
CHECKED_TEXTS = 16
"""Texts of each unit that an int8 encoder compares with FP32."""
ACTOR_RESTARTS = 3
"""Ray Data's default is to restart for ever, so a document that kills its process would never end the run."""


def embed(job: Job, snapshot: SnapshotManifest, cluster: Cluster) -> int:
    """Encode what the store lacks of a snapshot; returns how many passages that were.

    Raises DataError when more passages than the ceiling of the config have no vector.
    """
    files = parts(job.storage, snapshot)
    part_keys = [(file, read_keys(job.storage, layout.PASSAGES, file)) for file in files]
    folder, records = job.embedding_folder, job.embedding_records()
    known = np.union1d(stored_keys(job.embeddings, folder, records), quarantined_keys(job.embeddings, folder, records))
    passages = sum(len(keys) for _, keys in part_keys)
    units = plan_embedding(part_keys, known, unit_passages(job.config.compute, cluster, passages))
    total = sum(unit.passages for unit in units)
    job.say(Event("embed", "", 0, total, {}))
    done = _run(job, cluster, units, total) if units else []
    there = f"{passages - total} were there or are duplicates"
    job.say(Event("embed", f"{total} passages encoded, {there}{_summary(done)}", total, total))
    check_quarantine(job, np.unique(np.concatenate([keys for _, keys in part_keys])))
    return total


def check_quarantine(job: Job, live: Keys) -> None:
    """Raise DataError when more of the passages have no vector than the config accepts, or all."""
    found = is_among(live, quarantined_keys(job.embeddings, job.embedding_folder, job.embedding_records())).sum()
    corpus = job.config.corpus
    ceiling = max(corpus.max_bad_rows, int(corpus.max_bad_fraction * len(live)))
    if found:
        where = f"{job.embeddings.at(job.embedding_folder)}/*.rejected.parquet"
        job.say(Event("embed", f"{len(live)} passages = {len(live) - found} with a vector + {found} quarantined, see {where}"))
        if found > ceiling or found == len(live):
            raise DataError(
                f"{where}: {found} of {len(live)} passages have no vector, the ceiling is {ceiling}; "
                "use another model or precision, or raise corpus.max_bad_fraction / max_bad_rows"
            )


def unit_passages(compute: ComputeConfig, cluster: Cluster, passages: int) -> int:
    """Passages per embedding shard: as configured, else so that each encoder gets several units, within bounds."""
    largest = MAX_UNIT_PASSAGES["gpu" if cluster.gpus_per_encoder(compute) else "cpu"]
    share = -(-passages // (UNITS_PER_ENCODER * cluster.encoders(compute)))
    return compute.unit_passages or min(largest, max(MIN_UNIT_PASSAGES, share))


def _run(job: Job, cluster: Cluster, units: list[EmbedUnit], total: int) -> list[Record]:
    compute = job.config.compute
    rows = [{"unit": unit.model_dump_json()} for unit in units]
    threads = cluster.threads(compute)
    dataset = (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map(_tokenize_row, fn_args=(job.spec, job.storage), num_cpus=TOKENIZER_CPUS)
        .map(
            EncoderActor,
            fn_constructor_args=(job.spec, job.embeddings, job.embedding_folder, threads, total >= CALIBRATED_PASSAGES),
            compute=ray.data.ActorPoolStrategy(
                size=min(cluster.encoders(compute), len(units)), max_tasks_in_flight_per_actor=2
            ),
            num_cpus=cluster.reserved_cpus(compute),
            num_gpus=cluster.gpus_per_encoder(compute) or None,
            max_restarts=ACTOR_RESTARTS,
            max_task_retries=ACTOR_RESTARTS,
        )
    )
    records: list[Record] = []
    done = tokens = 0
    try:
        for row in dataset.iter_rows():
            records.append(record := Record.model_validate_json(row["record"]))
            done, tokens = done + record.counts["passages"] + record.counts["rejected"], tokens + record.counts["tokens"]
            job.say(Event("embed", "", done, total, {"tokens": tokens, "units": len(records)}))
    except ray.exceptions.RayError as error:
        raise own_error(error) from error
    if done != total:
        raise AssertionError(f"embed: {total} passages planned, {done} encoded or quarantined")
    return records


def _summary(records: list[Record]) -> str:
    """How well the encoders were used, for people."""
    if not records:
        return ""
    seconds = {name: sum(record.timings_s[name] for record in records) for name in ("encode", "waiting", "write")}
    tokens, padded = (sum(record.counts[name] for record in records) for name in ("tokens", "padded_tokens"))
    text = f"; {tokens / max(seconds['encode'], 1e-9):,.0f} tokens/s per encoder, {padded / max(tokens, 1) - 1:.1%} padding"
    for name, label in (("mfu", "MFU {:.0%}"), ("cosine_mean", "cosine to fp32 {:.4f}"), ("cosine_min", "minimum {:.4f}")):
        values = [record.rates[name] for record in records if name in record.rates]
        if values:
            text += ", " + label.format(min(values) if name == "cosine_min" else sum(values) / len(values))
    return f"{text}, waiting {seconds['waiting'] / max(sum(seconds.values()), 1e-9):.0%}"


def _tokenize_row(row: dict[str, Any], spec: EncoderSpec, storage: Storage) -> dict[str, Any]:
    unit = EmbedUnit.model_validate_json(row["unit"])
    tokenized = tokenize_unit(unit, storage, _tokenizer(spec), spec.document_prompt)
    arrays = {"keys": tokenized.keys.tobytes(), "ids": tokenized.ids.tobytes(), "lengths": tokenized.lengths.tobytes()}
    return {"name": unit.name, "timings": tokenized.timings_s, **arrays}


@lru_cache(maxsize=2)
def _tokenizer(spec: EncoderSpec) -> TextTokenizer:
    return TextTokenizer(find_model(spec.model, spec.revision), spec.max_tokens)


class EncoderActor:
    """One encoder on one GPU or one share of a node's cores."""

    def __init__(self, spec: EncoderSpec, storage: Storage, folder: str, threads: int, calibrate: bool) -> None:
        from pipeline.encoder import Encoder

        self._encoder: Encoder | VecmillError
        try:
            self._encoder = Encoder(spec, threads=threads)
            if calibrate:
                self._encoder.calibrate()
            self._peak = self._encoder.matmul_rate() if self._encoder.flops_per_token else None
        except VecmillError as error:  # raised by the first call: Ray keeps only the text of an error in a constructor
            self._encoder = error
        self._storage = storage
        self._folder = folder
        self._idle_since = time.perf_counter()

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        """Encode one tokenized unit, write its shard and record."""
        encoder = self._encoder
        if isinstance(encoder, VecmillError):
            raise encoder
        started = time.perf_counter()
        ids, lengths = np.frombuffer(row["ids"], dtype=np.int32), np.frombuffer(row["lengths"], dtype=np.int32)
        tokens, prompt = np.split(ids, np.cumsum(lengths)[:-1]), encoder.spec.document_prompt
        encoded = encoder.encode_tokens(tokens, prompt=prompt)
        encode_s = time.perf_counter() - started
        rates = {"mfu": encoded.tokens * encoder.flops_per_token / encode_s / self._peak} if self._peak else {}
        if encoder.spec.precision == "int8":
            checked = [row for row in range(0, len(tokens), -(-len(tokens) // CHECKED_TEXTS)) if row not in encoded.failed]
            cosine = encoder.cosine_to_exact([tokens[row] for row in checked], encoded.vectors[checked], prompt=prompt)
            rates |= {"cosine_mean": float(cosine.mean()), "cosine_min": float(cosine.min())} if checked else {}
        draft = Record(
            unit=row["name"],
            files=(),
            counts={
                "tokens": encoded.tokens,
                "padded_tokens": encoded.padded_tokens,
                "batch_tokens": encoder.batch_tokens,
            },
            timings_s={**row["timings"], "waiting": started - self._idle_since, "encode": encode_s},
            rates=rates,
        )
        keys = np.frombuffer(row["keys"], dtype=KEY_DTYPE)
        record = put_embeddings(self._storage, self._folder, keys, encoded.vectors, encoded.failed, draft)
        self._idle_since = time.perf_counter()
        return {"record": record.model_dump_json()}
