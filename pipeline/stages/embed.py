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
from pipeline.embeddings import EmbedUnit, TokenizedUnit, plan_embedding, put_embeddings, tokenize_unit
from pipeline.errors import VecmillError
from pipeline.job import Event, Job
from pipeline.manifest import Record, SnapshotManifest, list_records
from pipeline.model import EncoderSpec, TextTokenizer, find_model
from pipeline.shards import KEY_DTYPE, Keys, read_keys
from pipeline.snapshot import parts
from pipeline.stages.cluster import TOKENIZER_CPUS, Cluster, own_error
from pipeline.storage import Storage

MAX_UNIT_PASSAGES = {"cpu": 4096, "gpu": 32768}
"""A unit is what a crash repeats: some ten seconds of work."""
MIN_UNIT_PASSAGES = 512
UNITS_PER_ENCODER = 8
ACTOR_RESTARTS = 3
"""Ray Data's default is to restart for ever, so a document that kills its process would never end the run."""


def embed(job: Job, snapshot: SnapshotManifest, cluster: Cluster) -> int:
    """Encode what the store lacks of a snapshot; returns how many passages that were."""
    files = parts(job.storage, snapshot)
    part_keys = [(file, read_keys(job.storage, layout.PASSAGES, file)) for file in files]
    stored = stored_keys(
        job.embeddings, list(list_records(job.embeddings, job.embedding_folder).values()), job.embedding_folder
    )
    passages = sum(len(keys) for _, keys in part_keys)
    units = plan_embedding(part_keys, stored, unit_passages(job.config.compute, cluster, passages))
    total = sum(unit.passages for unit in units)
    job.say(Event("embed", "", 0, total, {}))
    if units:
        _run(job, cluster, units, total)
    job.say(Event("embed", f"{total} passages encoded, {passages - total} were there or are duplicates", total, total))
    return total


def stored_keys(storage: Storage, records: list[Record], folder: str) -> Keys:
    """Sorted distinct keys of an embedding store: 16 bytes of memory per passage."""
    keys = [read_keys(storage, folder, record.files[0]) for record in records]
    return np.unique(np.concatenate(keys)) if keys else np.empty(0, dtype=KEY_DTYPE)


def unit_passages(compute: ComputeConfig, cluster: Cluster, passages: int) -> int:
    """Passages per embedding shard: as configured, else so that each encoder gets several units, within bounds."""
    largest = MAX_UNIT_PASSAGES["gpu" if cluster.gpus_per_encoder(compute) else "cpu"]
    share = -(-passages // (UNITS_PER_ENCODER * cluster.encoders(compute)))
    return compute.unit_passages or min(largest, max(MIN_UNIT_PASSAGES, share))


def _run(job: Job, cluster: Cluster, units: list[EmbedUnit], total: int) -> None:
    compute = job.config.compute
    rows = [{"unit": unit.model_dump_json()} for unit in units]
    threads = cluster.threads(compute)
    dataset = (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map(_tokenize_row, fn_args=(job.spec, job.storage), num_cpus=TOKENIZER_CPUS)
        .map(
            EncoderActor,
            fn_constructor_args=(job.spec, job.embeddings, job.embedding_folder, threads),
            compute=ray.data.ActorPoolStrategy(
                size=min(cluster.encoders(compute), len(units)), max_tasks_in_flight_per_actor=2
            ),
            num_cpus=cluster.reserved_cpus(compute),
            num_gpus=cluster.gpus_per_encoder(compute) or None,
            max_restarts=ACTOR_RESTARTS,
            max_task_retries=ACTOR_RESTARTS,
        )
    )
    done = tokens = finished = 0
    try:
        for row in dataset.iter_rows():
            record = Record.model_validate_json(row["record"])
            done, tokens, finished = done + record.counts["passages"], tokens + record.counts["tokens"], finished + 1
            job.say(Event("embed", "", done, total, {"tokens": tokens, "units": finished}))
    except ray.exceptions.RayError as error:
        raise own_error(error) from error
    if done != total:
        raise AssertionError(f"embed: {total} passages planned, {done} encoded")


def _tokenize_row(row: dict[str, Any], spec: EncoderSpec, storage: Storage) -> dict[str, Any]:
    started = time.perf_counter()
    unit = EmbedUnit.model_validate_json(row["unit"])
    tokenized = tokenize_unit(unit, storage, _tokenizer(spec), spec.document_prompt)
    arrays = {"keys": tokenized.keys.tobytes(), "ids": tokenized.ids.tobytes(), "lengths": tokenized.lengths.tobytes()}
    return {"name": unit.name, "tokenize_s": time.perf_counter() - started, **arrays}


@lru_cache(maxsize=2)
def _tokenizer(spec: EncoderSpec) -> TextTokenizer:
    return TextTokenizer(find_model(spec.model, spec.revision), spec.max_tokens)


class EncoderActor:
    """One encoder on one GPU or one share of a node's cores."""

    def __init__(self, spec: EncoderSpec, storage: Storage, folder: str, threads: int) -> None:
        from pipeline.encoder import Encoder

        self._encoder: Encoder | VecmillError
        try:
            self._encoder = Encoder(spec, threads=threads)
        except VecmillError as error:  # raised by the first call: Ray keeps only the text of an error in a constructor
            self._encoder = error
        self._storage = storage
        self._folder = folder

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        """Encode one tokenized unit, write its shard and record."""
        if isinstance(self._encoder, VecmillError):
            raise self._encoder
        started = time.perf_counter()
        unit = TokenizedUnit(
            row["name"],
            np.frombuffer(row["keys"], dtype=KEY_DTYPE),
            np.frombuffer(row["ids"], dtype=np.int32),
            np.frombuffer(row["lengths"], dtype=np.int32),
        )
        tokens = np.split(unit.ids, np.cumsum(unit.lengths)[:-1])
        vectors = self._encoder.encode_tokens(tokens, prompt=self._encoder.spec.document_prompt)
        timings = {"tokenize": row["tokenize_s"], "encode": time.perf_counter() - started}
        return {"record": put_embeddings(self._storage, self._folder, unit, vectors, timings).model_dump_json()}
