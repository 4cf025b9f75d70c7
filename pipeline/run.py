"""The table of contents: a corpus becomes a live artifact.

Every stage reads manifests and writes files; what exists is not computed again, so running twice, resuming
after a crash and indexing what changed are the same command.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline.ann import drift
from pipeline.artifacts import publish
from pipeline.artifacts.artifact import verify
from pipeline.artifacts.indexing import is_asked_anew
from pipeline.artifacts.live import config_spec, spec_of
from pipeline.config import Config
from pipeline.embed.coverage import Coverage, cover, covered
from pipeline.errors import ConfigError
from pipeline.ingest.snapshot import snapshot_of
from pipeline.reports.account import make_account
from pipeline.reports.report import put_report
from pipeline.root import layout, retries
from pipeline.root.job import Event, Job, Say, plan_job
from pipeline.root.journal import journal
from pipeline.root.log import Lease, writing
from pipeline.root.manifest import ArtifactManifest, SnapshotManifest, TrainedManifest
from pipeline.root.storage import uri_scheme
from pipeline.search.judgements import read_queries
from pipeline.search.lexical import check_language
from pipeline.stages import index as stages
from pipeline.stages import metering
from pipeline.stages.cluster import Cluster, connected
from pipeline.stages.embed import embed
from pipeline.stages.ingest import ingest


@dataclass(frozen=True)
class Outcome:
    """What a run did: passages encoded, whether it trained, index shards made, the artifact it built, what is live now.

    ``retries``: requests to an object store that had to be made again.
    """

    run: str
    snapshot: SnapshotManifest
    encoded: int
    trained: bool
    index_shards: int
    built: ArtifactManifest | None
    live: ArtifactManifest | None
    committed: bool
    retries: int


def reindex(
    config: Config,
    *,
    limit: int | None = None,
    encode: bool = True,
    rebuild: bool = False,
    go_live: bool = True,
    say: Say = lambda _: None,
    run_id: str | None = None,
) -> Outcome:
    """Bring the root up to date with the corpus: encode, index and commit what changed, and nothing else.

    Without ``encode`` a passage that has no vector yet is an error (VerificationError). ``rebuild``: train for this corpus and
    merge a new artifact even where what is live would do. ``run_id``: the name of the run.
    """
    with running(config, say, run_id) as (job, lease, cluster):
        live = publish.usable_live(job)
        snapshot = ingest(job, limit)
        if go_live:
            publish.check_shrink(job, live, snapshot)
        encoded = embed(job, snapshot, cluster) if encode else 0
        coverage = cover(job, snapshot)
        trained, is_new = stages.train(job, coverage, cluster, live.index if live and not rebuild else None)
        added = stages.add(job, coverage, trained)
        content = publish.content_name(job, coverage, trained)
        if live and live.content == content and not rebuild:
            measured = _measured_again(job, coverage, live, lease, cluster) if go_live and is_asked_anew(job, live) else None
            if measured is None:
                job.say(Event("publish", f"nothing new: artifact {live.version} is live and holds this corpus"))
            built, live, committed = None, measured or live, bool(measured)
        else:
            built = build(job, coverage, trained, live, lease, cluster)
            if built.drifted:
                trained, is_new = stages.train(job, coverage, cluster, None)
                if trained.trained != built.index.trained:
                    added += stages.add(job, coverage, trained)
                    built = build(job, coverage, trained, built, lease, cluster)
            committed = go_live and _go_live(job, built, live, lease)
            live = built if committed else live
        again = retries.taken()
        metering.ended("committed" if committed else "unpublished" if built else "unchanged", live, again)
        return Outcome(job.run_id, snapshot, encoded, is_new, added, built, live, committed, again)


def build(
    job: Job, coverage: Coverage, trained: TrainedManifest, before: ArtifactManifest | None, lease: Lease, cluster: Cluster
) -> ArtifactManifest:
    """Merge, evaluate, judge and report under a version that no other writer can have: its epoch is in the name.

    ``before``: the artifact that this one follows; with the same trained index its baseline stays the one to compare with.
    """
    content = publish.content_name(job, coverage, trained)
    version = f"{lease.epoch:06d}-{content[:12]}"
    publish.check_unused(job.storage, version)
    merged = stages.merge(job, coverage, trained, version)
    evaluation = stages.evaluate(job, coverage, merged, trained, cluster)
    verdict = drift.judge(evaluation, trained, before, job.config)
    job.say(Event("drift", str(verdict), 1, 1))
    draft = publish.compose_manifest(job, content, coverage, trained, merged, (evaluation, verdict))
    report = put_report(job.storage, make_account(job, coverage, draft, merged))
    return publish.write_manifest(job.storage, draft, report)


def tune(config: Config, *, say: Say = lambda _: None) -> ArtifactManifest:
    """Measure the live artifact again on this machine and commit it with its new operating points."""
    with running(config, say) as (job, lease, cluster):
        live = publish.require_live(job.storage)
        config_spec(config, live)
        made_by = replace(job, spec=spec_of(live))  # maybe on other machines, whose encoder has other arithmetic
        return _measured_again(job, covered(made_by, snapshot_of(job.storage, live)), live, lease, cluster)


def _measured_again(job: Job, coverage: Coverage, live: ArtifactManifest, lease: Lease, cluster: Cluster) -> ArtifactManifest:
    """The live artifact with a new measurement, committed: its files stay as they are."""
    evaluation = stages.evaluate(job, coverage, live, live.index, cluster)
    measured = live.model_copy(update={"evaluation": evaluation})
    publish.check_gate(measured, job.config.publish.min_recall)
    entry = publish.commit(lease, job.storage, measured, measured_again=True)
    job.say(Event("publish", f"artifact {live.version} is live with new search settings, commit {entry.number}", 1, 1))
    return measured


@contextlib.contextmanager
def running(config: Config, say: Say, run_id: str | None = None) -> Iterator[tuple[Job, Lease, Cluster]]:
    """A job that holds its root, on a cluster."""
    if uri_scheme(config.root) == "memory":
        raise ConfigError("root: memory:// lives in one process and Ray works in many; use a folder or a bucket")
    if config.evaluation.queries:
        read_queries(config.evaluation.queries, config.store)  # a wrong path is told before hours of encoding
    check_language(config.index)
    retries.taken()  # those of an earlier run
    with connected(config.compute) as cluster:
        watched = metering.watched(say)
        job = plan_job(config, on_gpu=cluster.gpus_per_encoder(config.compute) > 0, say=watched, run_id=run_id)
        told = writing(job.storage, job.run_id, config.compute.lease_ttl_s, lambda text: job.say(Event("lock", text)))
        with told as lease, journal(job) as written:
            try:
                yield written, lease, cluster
            except Exception:
                metering.ended("failed")
                raise


def ingest_only(config: Config, *, limit: int | None = None, say: Say = lambda _: None) -> SnapshotManifest:
    """The first part of ``reindex``: the snapshot."""
    with running(config, say) as (job, _, _cluster):
        return ingest(job, limit)


def embed_only(config: Config, *, limit: int | None = None, say: Say = lambda _: None) -> int:
    """The first two parts of ``reindex``: the snapshot and its embeddings; returns the passages encoded."""
    with running(config, say) as (job, _, cluster):
        snapshot = ingest(job, limit)
        encoded = embed(job, snapshot, cluster)
        cover(job, snapshot)
        return encoded


def _go_live(job: Job, artifact: ArtifactManifest, live: ArtifactManifest | None, lease: Lease) -> bool:
    """Verify, gate, commit. A run with --limit does not replace an artifact without."""
    verify(job.storage, layout.artifact(artifact.version))
    publish.check_gate(artifact, job.config.publish.min_recall)
    if artifact.limit is not None and live is not None and live.limit is None:
        job.say(Event("publish", f"artifact {artifact.version} was made with --limit and does not replace {live.version}"))
        return False
    entry = publish.commit(lease, job.storage, artifact)
    job.say(Event("publish", f"artifact {artifact.version} is live, commit {entry.number}", 1, 1))
    return True
