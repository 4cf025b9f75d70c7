"""Train, add, evaluate: from the embedding store to index shards, and how good the merged index is. No Ray here."""

import time
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.ann import drift, index, operating, recall
from pipeline.ann.collection import Collection, open_collection
from pipeline.ann.index_plan import IndexPlan, is_coded
from pipeline.ann.index_shard import put_codes
from pipeline.ann.vectors import Vectors
from pipeline.artifacts.merging import local_files, trained_bytes
from pipeline.config import Config
from pipeline.embed.embeddings import vectors_of
from pipeline.errors import VerificationError
from pipeline.fingerprint import fingerprint, sha256
from pipeline.root import layout
from pipeline.root.job import Job
from pipeline.root.manifest import (
    ArtifactManifest,
    Evaluation,
    Health,
    Merged,
    OperatingPoint,
    Record,
    TrainedManifest,
    load,
    put_data,
    to_bytes,
)
from pipeline.root.shards import Keys, read_columns, read_keys
from pipeline.search.partition import LocalPartition
from pipeline.search.searcher import Searcher

AGREEMENT_SAMPLE = 1000


def trained_name(job: Job, plan: IndexPlan, live: Keys) -> tuple[str, recall.Ordinals]:
    """Fingerprint of the trained index that this plan and corpus give, and the ordinals of its training sample."""
    seed = job.config.index.seed
    queries = recall.held_out(live, job.config.evaluation.sample, seed)
    sample = recall.training_sample(live, plan.train_vectors, seed, queries)
    what = {name: value for name, value in asdict(plan).items() if name != "why"}
    keys_hash = sha256(live[sample].tobytes())
    return fingerprint({"train": 2, "encoder": job.spec.fingerprint, "plan": what, "sample": keys_hash, "seed": seed}), sample


def train(job: Job, plan: IndexPlan, live: Keys) -> tuple[TrainedManifest, bool]:
    """Train an index on a uniform sample of the live embeddings, or find it done; and whether it is new."""
    started = time.perf_counter()
    name, sample = trained_name(job, plan, live)
    path = f"{layout.trained(name)}/manifest.json"
    if (found := load(TrainedManifest, job.storage, path)) is not None:
        return found, False
    file = None
    if plan.kind != "flat":
        vectors = stored_vectors(job, live[sample])
        data = index.train(plan, vectors, job.config.index.seed)
        file = put_data(job.storage, f"{layout.trained(name)}/index", ".faiss", data, 0)
    manifest = TrainedManifest(
        trained=name,
        encoder=job.spec.fingerprint,
        file=file,
        dim=job.spec.dim,
        passages=len(live),
        request=index_request(job.config),
        timings_s={"total": time.perf_counter() - started},
        **asdict(plan),
    )
    job.storage.create(path, to_bytes(manifest))
    return load(TrainedManifest, job.storage, path) or manifest, True


def index_request(config: Config) -> dict[str, Any]:
    """The part of the config that decides what is trained."""
    return config.index.model_dump(mode="json", exclude={"target_recall", "partitions", "rescore", "lexical", "language"})


def may_reuse(trained: TrainedManifest, plan: IndexPlan, job: Job, passages: int) -> bool:
    """Whether the live artifact's trained index is worth a try: same encoder, request and kind, corpus within half and double.

    Whether it fits is judged by what is made with it (pipeline.ann.drift).
    """
    same = (trained.encoder, trained.request, trained.kind) == (job.spec.fingerprint, index_request(job.config), plan.kind)
    return same and trained.passages <= 2 * passages and passages <= 2 * trained.passages


@lru_cache(maxsize=1)
def _opened(data: bytes) -> index.Trained:
    """A worker adds many shards with one trained index."""
    return index.Trained(data)


def add(job: Job, shard: Record, trained: TrainedManifest) -> Record:
    """Turn one embedding shard into an index shard: FAISS codes, row by row."""
    started = time.perf_counter()
    file = shard.files[0]
    table = read_columns(job.embeddings, job.embedding_folder, file, ["embedding"])
    vectors = vectors_of(table.column("embedding"), trained.dim).astype(np.float32)
    opened = _opened(trained_bytes(job.storage, trained))
    codes = opened.encode(vectors, job.embeddings.at(f"{job.embedding_folder}/{file.name}"))
    rates = {"agreement": opened.agreement(vectors[:AGREEMENT_SAMPLE])}
    timings = {"total": time.perf_counter() - started}
    return put_codes(job.storage, trained, shard.unit, codes, rates=rates, timings_s=timings)


def evaluate(job: Job, merged: Merged, trained: TrainedManifest, live: Keys) -> Evaluation:
    """Measure recall@k and latency of the merged index on held-out passages or on the config's queries; choose the setting."""
    settings, search = job.config.evaluation, job.config.search
    with local_files(job, merged) as folder:
        collection = open_collection(folder, merged)
        vectors = collection.vectors
        queries, own = _queries(job, vectors, live)
        k = min(settings.k, len(vectors) - (own is not None))
        truth = operating.ground_truth(vectors, queries, own, max(k, 1))
        target = job.config.index.target_recall
        measured = operating.measure(collection, truth, target, nprobe=search.nprobe, rescoring=search.rescore)
        best = operating.choose(measured, target, search.max_latency_ms)
        health = _health(job, collection, trained, live)
        labelled = _labelled(job, merged, folder, best.point) if settings.qrels else None
    return Evaluation(
        asked=asked(job),
        k=settings.k,
        queries=best.recall.queries,
        source=settings.queries or "sampled passages",
        recall=best.recall.mean,
        recall_low=best.recall.low,
        recall_high=best.recall.high,
        gated=len(vectors) >= recall.MIN_GATED_PASSAGES,
        point=best.point,
        points=tuple(each.point for each in measured),
        health=health,
        labelled=labelled,
    )


def is_asked_anew(job: Job, live: ArtifactManifest) -> bool:
    """Whether the live artifact's measurement answers other wishes than the config's."""
    return live.evaluation.asked != asked(job)


def asked(job: Job) -> str:
    """Fingerprint of what a measurement is asked for: other wishes are measured again over the same artifact."""
    config = job.config
    wishes = config.evaluation.model_dump(mode="json") | {"target_recall": config.index.target_recall}
    wishes |= config.search.model_dump(mode="json", include={"nprobe", "rescore", "max_latency_ms"})
    return fingerprint({"queries": [job.spec.query_space, job.spec.query_prompt], **wishes})


def stored_vectors(job: Job, keys: Keys) -> recall.Matrix:
    """The embedding store's vectors of sorted distinct keys, (n, dim); raises VerificationError where one is missing."""
    vectors = np.zeros((len(keys), job.spec.dim), dtype=np.float32)
    missing = np.ones(len(keys), dtype=bool)
    for record in sorted(job.embedding_records(), key=lambda record: record.unit):
        stored = read_keys(job.embeddings, job.embedding_folder, record.files[0])
        places = np.searchsorted(keys, stored).clip(max=len(keys) - 1)
        rows = np.flatnonzero((keys[places] == stored) & missing[places])
        if len(rows):
            column = read_columns(job.embeddings, job.embedding_folder, record.files[0], ["embedding"]).column("embedding")
            vectors[places[rows]] = vectors_of(column, job.spec.dim)[rows]
            missing[places[rows]] = False
    if missing.any():
        where = job.embeddings.at(job.embedding_folder)
        raise VerificationError(f"{where}: {int(missing.sum())} of {len(keys)} passages have no vector; run embed again")
    return vectors


def _health(job: Job, collection: Collection, trained: TrainedManifest, live: Keys) -> Health | None:
    """None for a tiny corpus too: an error over the vectors that were trained on says nothing."""
    if len(live) < recall.MIN_HELD_OUT_PASSAGES:
        return None
    sample = recall.held_out(live, job.config.evaluation.sample, job.config.index.seed)
    opened = _opened(trained_bytes(job.storage, trained)) if is_coded(trained.kind) else None
    return drift.measure(collection.index.list_sizes(), opened, collection.vectors[sample].astype(np.float32))


def _queries(job: Job, vectors: Vectors, live: Keys) -> tuple[recall.Matrix, recall.Ordinals | None]:
    settings = job.config.evaluation
    if settings.queries is None:
        own = recall.held_out(live, settings.sample, job.config.index.seed)
        own = own if len(live) > 1 else own[:0]  # one passage has no neighbours to find
        return vectors[own].astype(np.float32), own
    from pipeline.search.evaluation import encode_queries

    return encode_queries(job.spec, settings.queries, job.config.store), None


def _labelled(job: Job, merged: Merged, folder: Path, point: OperatingPoint) -> dict[str, dict[str, float]]:
    from pipeline.search.evaluation import labelled

    settings = job.config.evaluation
    searcher = Searcher([LocalPartition(folder, merged)], merged, point)
    return labelled(searcher, job.spec, settings.queries or "", settings.qrels or "", job.config.store)
