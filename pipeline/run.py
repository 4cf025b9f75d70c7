"""The table of contents: a corpus becomes a live artifact.

Every stage reads manifests and writes files; what exists is not computed again, so running twice, resuming
after a crash and indexing what changed are the same command.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline import layout, publish
from pipeline.artifact import verify
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.evaluation import read_queries
from pipeline.job import Event, Job, Say, plan_job
from pipeline.log import Lease, writing
from pipeline.manifest import ArtifactManifest, SnapshotManifest, TrainedManifest
from pipeline.stages import index as stages
from pipeline.stages.cluster import Cluster, connected
from pipeline.stages.embed import embed
from pipeline.stages.ingest import ingest
from pipeline.storage import uri_scheme


@dataclass(frozen=True)
class Outcome:
    """What a run did: passages encoded, whether it trained, index shards made, the artifact it built, what is live now."""

    run: str
    snapshot: SnapshotManifest
    encoded: int
    trained: bool
    index_shards: int
    built: ArtifactManifest | None
    live: ArtifactManifest | None
    committed: bool


def reindex(
    config: Config, *, limit: int | None = None, encode: bool = True, go_live: bool = True, say: Say = lambda _: None
) -> Outcome:
    """Bring the root up to date with the corpus: encode, index and commit what changed, and nothing else.

    Without ``encode`` a passage that has no vector yet is an error (VerificationError).
    """
    with running(config, say) as (job, lease, cluster):
        live = publish.usable_live(job)
        snapshot = ingest(job, limit)
        encoded = embed(job, snapshot, cluster) if encode else 0
        trained, is_new = stages.train(job, snapshot, cluster, live.index if live else None)
        added = stages.add(job, snapshot, trained)
        content = publish.content_name(job, snapshot, trained, stages.left_out(job, snapshot))
        if live and live.content == content:
            say(Event("publish", f"nothing new: artifact {live.version} is live and holds this corpus"))
            return Outcome(job.run_id, snapshot, encoded, is_new, added, None, live, committed=False)
        built = build(job, content, snapshot, trained, lease, cluster)
        committed = go_live and _go_live(job, built, live, lease)
        return Outcome(job.run_id, snapshot, encoded, is_new, added, built, built if committed else live, committed)


def build(
    job: Job, content: str, snapshot: SnapshotManifest, trained: TrainedManifest, lease: Lease, cluster: Cluster
) -> ArtifactManifest:
    """Merge and evaluate under a version that no other writer can have: its epoch is in the name."""
    version = f"{lease.epoch:06d}-{content[:12]}"
    publish.check_unused(job.storage, version)
    merged = stages.merge(job, snapshot, trained, version)
    evaluation = stages.evaluate(job, snapshot, trained, merged, cluster)
    return publish.write_manifest(job, content, snapshot, trained, merged, evaluation)


@contextlib.contextmanager
def running(config: Config, say: Say) -> Iterator[tuple[Job, Lease, Cluster]]:
    """A job that holds its root, on a cluster."""
    if uri_scheme(config.root) == "memory":
        raise ConfigError("root: memory:// lives in one process and Ray works in many; use a folder or a bucket")
    if config.evaluation.queries:
        read_queries(config.evaluation.queries, config.store)  # a wrong path is told before hours of encoding
    with connected(config.compute) as cluster:
        job = plan_job(config, on_gpu=cluster.gpus_per_encoder(config.compute) > 0, say=say)
        with writing(job.storage, job.run_id, config.compute.lease_ttl_s, lambda text: say(Event("lock", text))) as lease:
            yield job, lease, cluster


def ingest_only(config: Config, *, limit: int | None = None, say: Say = lambda _: None) -> SnapshotManifest:
    """The first part of ``reindex``: the snapshot."""
    with running(config, say) as (job, _, _cluster):
        return ingest(job, limit)


def embed_only(config: Config, *, limit: int | None = None, say: Say = lambda _: None) -> int:
    """The first two parts of ``reindex``: the snapshot and its embeddings; returns the passages encoded."""
    with running(config, say) as (job, _, cluster):
        return embed(job, ingest(job, limit), cluster)


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
