"""Train, add, merge and evaluate as Ray tasks. Their inputs are read again where they run; only names travel."""

from dataclasses import replace

from pipeline.ann import index
from pipeline.ann.index_plan import choose, is_coded
from pipeline.artifacts import indexing, merging
from pipeline.artifacts.key_merge import Sources
from pipeline.embed.coverage import Coverage, covered_keys
from pipeline.ingest.snapshot import parts
from pipeline.root import layout
from pipeline.root.job import Event, Job, Meter, stage
from pipeline.root.manifest import Evaluation, Merged, MergeRecord, Record, TrainedManifest, list_records
from pipeline.root.shards import Keys, is_among, read_keys
from pipeline.stages.cluster import Cluster, run_all, run_one


@stage("train")
def train(job: Job, coverage: Coverage, cluster: Cluster, live: TrainedManifest | None) -> tuple[TrainedManifest, bool]:
    """The trained index for what is covered, and whether it is new: that of the ``live`` artifact is kept while it fits."""
    trained: TrainedManifest
    trained, is_new = run_one(_train, _plain(job), coverage, live, cluster.node_cpus, cpus=1)
    size = f", nlist {trained.nlist}" if trained.nlist else f" {trained.factory}"
    size += f", m {trained.m}, {trained.nbits} bits" if trained.m else ""
    job.say(Event("train", f"{'chosen' if is_new else 'reused'}: {trained.kind}{size.rstrip()}; {trained.why}", 1, 1))
    return trained, is_new


@stage("add")
def add(job: Job, coverage: Coverage, trained: TrainedManifest) -> int:
    """Make the index shards that are missing; returns how many those were. A flat index has none."""
    if not is_coded(trained.kind):
        job.say(Event("add", f"a {trained.kind} index is built from vectors at the merge, nothing to add"))
        return 0
    done = set(list_records(job.storage, layout.index_shards(trained.trained)))
    live = covered_keys(job, coverage)
    missing = [record for record in job.embedding_records() if record.unit not in done and _has_live(job, record, live)]
    finished: list[Record] = []

    def count(record: Record) -> None:
        finished.append(record)
        vectors = sum(record.counts["vectors"] for record in finished)
        job.say(Event("add", "", len(finished), len(missing), {"vectors": vectors}))

    run_all(_add, [(_plain(job), record, trained) for record in missing], cpus=1, done=count)
    job.say(Event("add", f"{len(missing)} index shards made", len(missing), len(missing)))
    return len(missing)


@stage("merge")
def merge(job: Job, coverage: Coverage, trained: TrainedManifest, version: str) -> MergeRecord:
    """The data files of the artifact ``version``."""
    merged: MergeRecord = run_one(_merge, _plain(job), coverage, trained, version, cpus=1)
    size_bytes = sum(file.size_bytes for file in merged.files.values())
    job.say(Event("merge", f"{merged.counts['passages']} passages, {size_bytes / 1e6:.1f} MB", 1, 1, merged.counts))
    return merged


@stage("evaluate")
def evaluate(job: Job, coverage: Coverage, merged: Merged, trained: TrainedManifest, cluster: Cluster) -> Evaluation:
    """Recall of a merged index."""
    found: Evaluation = run_one(_evaluate, _plain(job), coverage, merged, trained, cluster.node_cpus, cpus=1)
    interval = f"{found.recall:.4f} (95 % {found.recall_low:.4f} to {found.recall_high:.4f})"
    setting = f"nprobe {found.point.nprobe}, rescore {found.point.rescore}" if found.point.nprobe else "exact"
    job.say(Event("evaluate", f"recall@{found.k} {interval} over {found.queries} {found.source}, {setting}", 1, 1))
    return found


def _train(job: Job, coverage: Coverage, live_trained: TrainedManifest | None, threads: int) -> tuple[TrainedManifest, bool]:
    index.set_threads(threads)
    live = covered_keys(job, coverage)
    plan = choose(job.config.index, len(live), job.spec.dim)
    if live_trained is not None and indexing.may_reuse(live_trained, plan, job, len(live)):
        return live_trained, False
    return indexing.train(job, plan, live)


def _add(job: Job, record: Record, trained: TrainedManifest) -> Record:
    index.set_threads(1)
    return indexing.add(job, record, trained)


def _merge(job: Job, coverage: Coverage, trained: TrainedManifest, version: str) -> MergeRecord:
    index.set_threads(1)
    files = parts(job.storage, coverage.snapshot)
    return merging.merge(Sources(job, files, coverage.left_out, job.embedding_records(), trained), version)


def _evaluate(job: Job, coverage: Coverage, merged: Merged, trained: TrainedManifest, threads: int) -> Evaluation:
    index.set_threads(threads)
    return indexing.evaluate(job, merged, trained, covered_keys(job, coverage))


def _has_live(job: Job, record: Record, live: Keys) -> bool:
    return bool(is_among(read_keys(job.embeddings, job.embedding_folder, record.files[0]), live).any())


def _plain(job: Job) -> Job:
    """The job as it may travel: without the way to tell progress, which belongs to the driver."""
    return replace(job, say=Meter(job.run_id))
