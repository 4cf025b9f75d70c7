"""Train, add, merge, evaluate: from the embedding store to the data files of an artifact. No Ray here.

Ordinals are ranks of the live keys. A key that several embedding shards hold is taken from the one whose
unit name is lowest; the others are left out and counted.
"""

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import artifact, index, layout, recall
from pipeline.config import Config
from pipeline.embeddings import vectors_of
from pipeline.errors import VerificationError
from pipeline.fingerprint import fingerprint, sha256
from pipeline.job import Job
from pipeline.manifest import DataFile, Evaluation, MergeRecord, Record, TrainedManifest, load, put_data, put_record, to_bytes
from pipeline.searcher import DOCUMENTS, INDEX, VECTORS, open_vectors, search_vectors
from pipeline.shards import Keys, fixed_binary, parquet_bytes, read_columns, read_keys, to_rows
from pipeline.storage import Storage


@dataclass(frozen=True)
class LiveShard:
    """An embedding shard and the ordinal of each of its rows: -1 for rows that are dead or held by an earlier shard."""

    record: Record
    ordinals: recall.Ordinals

    @property
    def file(self) -> DataFile:
        """The shard's Parquet file."""
        return self.record.files[0]


def live_shards(storage: Storage, folder: str, records: Sequence[Record], live: Keys) -> list[LiveShard]:
    """The shards that hold live keys, by unit name; raises VerificationError when a live key has no vector."""
    taken = np.zeros(len(live), dtype=bool)
    shards = []
    for record in sorted(records, key=lambda record: record.unit):
        keys = read_keys(storage, folder, record.files[0])
        ordinals = np.searchsorted(live, keys)
        ordinals[ordinals == len(live)] = 0
        ordinals[(live[ordinals] != keys) | taken[ordinals]] = -1
        if (ordinals >= 0).any():
            taken[ordinals[ordinals >= 0]] = True
            shards.append(LiveShard(record, ordinals.astype(np.int64)))
    if not taken.all():
        missing = len(live) - int(taken.sum())
        raise VerificationError(f"{storage.at(folder)}: {missing} of {len(live)} passages have no vector; run embed again")
    return shards


def trained_name(job: Job, plan: index.IndexPlan, live: Keys) -> tuple[str, recall.Ordinals]:
    """Fingerprint of the trained index that this plan and corpus give, and the ordinals of its training sample."""
    seed = job.config.index.seed
    queries = recall.held_out(live, job.config.evaluation.sample, seed)
    sample = recall.training_sample(live, plan.train_vectors, seed, queries)
    what = {name: value for name, value in asdict(plan).items() if name != "why"}
    keys_hash = sha256(live[sample].tobytes())
    return fingerprint({"train": 1, "encoder": job.spec.fingerprint, "plan": what, "sample": keys_hash, "seed": seed}), sample


def train(job: Job, plan: index.IndexPlan, shards: Sequence[LiveShard], live: Keys) -> tuple[TrainedManifest, bool]:
    """Train an index on a uniform sample of the live embeddings, or find it done; and whether it is new."""
    started = time.perf_counter()
    name, sample = trained_name(job, plan, live)
    path = f"{layout.trained(name)}/manifest.json"
    if (found := load(TrainedManifest, job.storage, path)) is not None:
        return found, False
    file = None
    if plan.kind == "ivfpq":
        vectors = _sample_vectors(job, shards, sample)
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
    return config.index.model_dump(mode="json", exclude={"target_recall"})


def may_reuse(trained: TrainedManifest, plan: index.IndexPlan, job: Job, passages: int) -> bool:
    """Whether the live artifact's trained index still fits: same encoder, request and kind, corpus within half and double."""
    same = (trained.encoder, trained.request, trained.kind) == (job.spec.fingerprint, index_request(job.config), plan.kind)
    return same and trained.passages <= 2 * passages and passages <= 2 * trained.passages


def load_trained(storage: Storage, trained: TrainedManifest) -> Any:
    """The empty trained index, its bytes checked against the manifest."""
    if trained.file is None:
        raise ValueError("a flat index has no trained part")
    path = f"{layout.trained(trained.trained)}/{trained.file.name}"
    data = storage.read(path)
    if sha256(data) != trained.file.sha256:
        raise VerificationError(f"{storage.at(path)}: its bytes are not those of its manifest; delete the folder and run again")
    return index.load_trained(data)


def add(job: Job, shard: Record, trained: TrainedManifest) -> Record:
    """Turn one embedding shard into an index shard: FAISS codes, row by row."""
    started = time.perf_counter()
    file = shard.files[0]
    table = read_columns(job.embeddings, job.embedding_folder, file, ["embedding"])
    vectors = vectors_of(table.column("embedding"), trained.dim).astype(np.float32)
    codes = index.encode(load_trained(job.storage, trained), vectors, job.embeddings.at(f"{job.embedding_folder}/{file.name}"))
    schema = pa.schema([pa.field("code", pa.binary(codes.shape[1]), nullable=False)])
    folder = layout.index_shards(trained.trained)
    data = parquet_bytes(pa.table({"code": fixed_binary(codes)}, schema=schema), compress=False)
    put = put_data(job.storage, f"{folder}/{shard.unit}", ".parquet", data, len(codes))
    timings = {"total": time.perf_counter() - started}
    record = Record(unit=shard.unit, files=(put,), counts={"vectors": len(codes)}, timings_s=timings)
    return put_record(job.storage, folder, record)


def merge(
    job: Job, version: str, parts: Sequence[DataFile], shards: Sequence[LiveShard], trained: TrainedManifest, live: Keys
) -> MergeRecord:
    """Write the data files of an artifact: vectors and documents in ordinal order, and the index over ordinals."""
    started = time.perf_counter()
    with scratch(job) as folder:
        files = [(job.embedding_folder, shard.file) for shard in shards]
        artifact.write_vectors(job.embeddings, files, live, trained.dim, folder / VECTORS)
        rows = artifact.write_documents(job.storage, parts, live, folder / DOCUMENTS)
        index.write(_merged_index(job, shards, trained, folder), folder / INDEX)
        counts = {"passages": len(live), "document_rows": rows, "shards": len(shards)}
        counts["quarantined_rows"] = sum(part.rows for part in parts) - rows
        counts["duplicate_vectors"] = sum(int((shard.ordinals < 0).sum()) for shard in shards)
        lengths = {VECTORS: len(live), DOCUMENTS: rows, INDEX: len(live)}
        described = {name: artifact.describe(folder / name, lengths[name]) for name in lengths}
        for name in described:
            job.storage.adopt(f"{layout.artifact(version)}/{name}", folder / name)
    record = MergeRecord(
        version=version,
        files=described,
        records={shard.record.unit: shard.file.sha256 for shard in shards},
        counts=counts,
        timings_s={"total": time.perf_counter() - started},
    )
    job.storage.put(layout.run(job.run_id, "merge.json"), to_bytes(record))
    return record


def evaluate(job: Job, merged: MergeRecord, trained: TrainedManifest, live: Keys) -> Evaluation:
    """Measure recall@k and latency of the merged index on held-out passages or on the config's queries; choose the setting."""
    settings = job.config.evaluation
    with local_files(job, merged) as folder:
        vectors = open_vectors(folder / VECTORS, trained.dim)
        opened = index.read(folder / INDEX, dim=trained.dim, ntotal=len(vectors))
        queries, own = _queries(job, vectors, live)
        k = min(settings.k, len(vectors) - (own is not None))
        truth = recall.ground_truth(vectors, queries, own, max(k, 1))

        def search(queries: recall.Matrix, k: int, nprobe: int, rescoring: int) -> tuple[recall.Matrix, recall.Ordinals]:
            return search_vectors(opened, vectors, queries, k, nprobe=nprobe, rescoring=rescoring)

        wanted = _settings(job.config, trained.nlist)
        point, found, points = recall.choose_point(search, vectors, truth, wanted, job.config.index.target_recall)
    evaluation = Evaluation(
        k=settings.k,
        queries=found.queries,
        source=settings.queries or "sampled passages",
        recall=found.mean,
        recall_low=found.low,
        recall_high=found.high,
        gated=len(vectors) >= recall.MIN_GATED_PASSAGES,
        point=point,
        points=points,
        labelled=_labelled(job, merged, trained.dim, point) if settings.qrels else None,
    )
    job.storage.put(layout.run(job.run_id, "evaluation.json"), to_bytes(evaluation))
    return evaluation


@contextlib.contextmanager
def scratch(job: Job) -> Iterator[Path]:
    """A local folder for files in the making, gone afterwards: on a local root beside their final place."""
    parent = job.config.compute.scratch or (job.storage.uri if job.storage.is_local else None)
    if parent:
        Path(parent).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".scratch-", dir=parent) as folder:
        yield Path(folder)


@contextlib.contextmanager
def local_files(job: Job, merged: MergeRecord) -> Iterator[Path]:
    """The merged files as a local folder: in place on a local root, else a copy that is gone afterwards."""
    folder = layout.artifact(merged.version)
    if job.storage.is_local:
        yield Path(job.storage.at(folder))
        return
    with scratch(job) as copy:
        for name in merged.files:
            job.storage.fetch(f"{folder}/{name}", copy / name)
        yield copy


def _merged_index(job: Job, shards: Sequence[LiveShard], trained: TrainedManifest, folder: Path) -> Any:
    if trained.kind == "flat":
        return index.flat(open_vectors(folder / VECTORS, trained.dim))
    return index.merge(load_trained(job.storage, trained), _codes(job.storage, shards, trained))


def _codes(
    storage: Storage, shards: Sequence[LiveShard], trained: TrainedManifest
) -> Iterator[tuple[index.Codes, recall.Ordinals]]:
    """Codes and ordinals of each shard; raises VerificationError when an index shard is missing or of other length."""
    folder = layout.index_shards(trained.trained)
    for shard in shards:
        record = load(Record, storage, f"{folder}/{shard.record.unit}.json")
        if record is None or record.files[0].rows != len(shard.ordinals):
            raise VerificationError(f"{storage.at(folder)}/{shard.record.unit}: no index shard; run again")
        table = read_columns(storage, folder, record.files[0], ["code"])
        yield to_rows(table.column("code"), np.uint8).reshape(len(shard.ordinals), -1), shard.ordinals


def _sample_vectors(job: Job, shards: Sequence[LiveShard], sample: recall.Ordinals) -> recall.Matrix:
    vectors = np.zeros((len(sample), job.spec.dim), dtype=np.float32)
    for shard in shards:
        places = np.minimum(np.searchsorted(sample, shard.ordinals), len(sample) - 1)
        rows = np.flatnonzero((sample[places] == shard.ordinals) & (shard.ordinals >= 0))
        if len(rows):
            table = read_columns(job.embeddings, job.embedding_folder, shard.file, ["embedding"])
            vectors[places[rows]] = vectors_of(table.column("embedding"), job.spec.dim)[rows]
    return vectors


def _queries(job: Job, vectors: recall.Vectors, live: Keys) -> tuple[recall.Matrix, recall.Ordinals | None]:
    settings = job.config.evaluation
    if settings.queries is None:
        own = recall.held_out(live, settings.sample, job.config.index.seed)
        own = own if len(live) > 1 else own[:0]  # one passage has no neighbours to find
        return vectors[own].astype(np.float32), own
    from pipeline.evaluation import encode_queries

    encoded = encode_queries(job.spec, settings.queries, job.config.store)
    return np.stack(list(encoded.values())), None


def _labelled(job: Job, merged: MergeRecord, dim: int, point: Any) -> dict[str, dict[str, float]]:
    from pipeline.evaluation import encode_queries, labelled, read_qrels
    from pipeline.searcher import Searcher

    settings = job.config.evaluation
    qrels = read_qrels(settings.qrels or "", job.config.store)
    with local_files(job, merged) as folder:
        queries = encode_queries(job.spec, settings.queries or "", job.config.store, only=qrels.keys())
        return labelled(Searcher(folder, dim, point), queries, qrels)


def _settings(config: Config, nlist: int) -> Iterator[tuple[int, int]]:
    """The settings to try, each once; what the config fixes stays fixed."""
    fixed = config.search
    seen = set()
    for nprobe, rescoring in recall.settings_to_try(nlist):
        setting = (fixed.nprobe if fixed.nprobe and nlist else nprobe, rescoring if fixed.rescore is None else fixed.rescore)
        if setting not in seen:
            seen.add(setting)
            yield setting
