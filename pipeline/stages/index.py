"""Train, add, merge and evaluate as Ray tasks. Their inputs are read again where they run; only names travel."""

from dataclasses import replace

from pipeline import index, indexing, layout
from pipeline.embeddings import is_among, quarantined_keys
from pipeline.job import Event, Job
from pipeline.manifest import Evaluation, MergeRecord, Record, SnapshotManifest, TrainedManifest, list_records
from pipeline.shards import Keys, read_keys
from pipeline.snapshot import live_keys, parts
from pipeline.stages.cluster import Cluster, run_all, run_one


def train(job: Job, snapshot: SnapshotManifest, cluster: Cluster, live: TrainedManifest | None) -> tuple[TrainedManifest, bool]:
    """The trained index for a snapshot, and whether it is new: that of the ``live`` artifact is kept while it fits."""
    trained: TrainedManifest
    trained, is_new = run_one(_train, _plain(job), snapshot, live, cluster.node_cpus, cpus=1)
    size = "" if trained.kind == "flat" else f", nlist {trained.nlist}, m {trained.m}, {trained.nbits} bits"
    job.say(Event("train", f"{'chosen' if is_new else 'reused'}: {trained.kind}{size}; {trained.why}", 1, 1))
    return trained, is_new


def add(job: Job, snapshot: SnapshotManifest, trained: TrainedManifest) -> int:
    """Make the index shards that are missing; returns how many those were. A flat index has none."""
    if trained.kind == "flat":
        job.say(Event("add", "a flat index is its vectors, nothing to add"))
        return 0
    done = set(list_records(job.storage, layout.index_shards(trained.trained)))
    live = _live(job, snapshot)
    missing = [record for record in job.embedding_records() if record.unit not in done and _has_live(job, record, live)]
    finished: list[Record] = []

    def count(record: Record) -> None:
        finished.append(record)
        vectors = sum(record.counts["vectors"] for record in finished)
        job.say(Event("add", "", len(finished), len(missing), {"vectors": vectors}))

    run_all(_add, [(_plain(job), record, trained) for record in missing], cpus=1, done=count)
    job.say(Event("add", f"{len(missing)} index shards made", len(missing), len(missing)))
    return len(missing)


def merge(job: Job, snapshot: SnapshotManifest, trained: TrainedManifest, version: str) -> MergeRecord:
    """The data files of the artifact ``version``."""
    merged: MergeRecord = run_one(_merge, _plain(job), snapshot, trained, version, cpus=1)
    size_bytes = sum(file.size_bytes for file in merged.files.values())
    job.say(Event("merge", f"{merged.counts['passages']} passages, {size_bytes / 1e6:.1f} MB", 1, 1, merged.counts))
    return merged


def evaluate(
    job: Job, snapshot: SnapshotManifest, trained: TrainedManifest, merged: MergeRecord, cluster: Cluster
) -> Evaluation:
    """Recall of the merged index."""
    found: Evaluation = run_one(_evaluate, _plain(job), snapshot, merged, trained, cluster.node_cpus, cpus=1)
    interval = f"{found.recall:.4f} (95 % {found.recall_low:.4f} to {found.recall_high:.4f})"
    setting = f"nprobe {found.point.nprobe}, rescore {found.point.rescore}" if trained.nlist else "exact"
    job.say(Event("evaluate", f"recall@{found.k} {interval} over {found.queries} {found.source}, {setting}", 1, 1))
    return found


def _train(
    job: Job, snapshot: SnapshotManifest, live_trained: TrainedManifest | None, threads: int
) -> tuple[TrainedManifest, bool]:
    index.set_threads(threads)
    live = _live(job, snapshot)
    plan = index.choose(job.config.index, len(live), job.spec.dim)
    if live_trained is not None and indexing.may_reuse(live_trained, plan, job, len(live)):
        return live_trained, False
    return indexing.train(job, plan, _shards(job, live), live)


def _add(job: Job, record: Record, trained: TrainedManifest) -> Record:
    index.set_threads(1)
    return indexing.add(job, record, trained)


def _merge(job: Job, snapshot: SnapshotManifest, trained: TrainedManifest, version: str) -> MergeRecord:
    index.set_threads(1)
    live = _live(job, snapshot)
    files = parts(job.storage, snapshot)
    return indexing.merge(job, version, files, _shards(job, live), trained, live)


def _evaluate(job: Job, snapshot: SnapshotManifest, merged: MergeRecord, trained: TrainedManifest, threads: int) -> Evaluation:
    index.set_threads(threads)
    return indexing.evaluate(job, merged, trained, _live(job, snapshot))


def left_out(job: Job, snapshot: SnapshotManifest) -> Keys:
    """Sorted keys of the passages in quarantine: those of the snapshot that the encoder can make no vector of."""
    found = quarantined_keys(job.embeddings, job.embedding_folder, job.embedding_records())
    return found[is_among(found, live_keys(job.storage, parts(job.storage, snapshot)))] if len(found) else found


def _live(job: Job, snapshot: SnapshotManifest) -> Keys:
    keys = live_keys(job.storage, parts(job.storage, snapshot))
    return keys[~is_among(keys, left_out(job, snapshot))]


def _shards(job: Job, live: Keys) -> list[indexing.LiveShard]:
    return indexing.live_shards(job.embeddings, job.embedding_folder, job.embedding_records(), live)


def _has_live(job: Job, record: Record, live: Keys) -> bool:
    return bool(is_among(read_keys(job.embeddings, job.embedding_folder, record.files[0]), live).any())


def _plain(job: Job) -> Job:
    """The job as it may travel: without the way to tell progress, which belongs to the driver."""
    return replace(job, say=_mute)


def _mute(event: Event) -> None:
    del event
