"""Put an artifact live: manifest, verification of every stored byte, the recall gate, the commit."""

import importlib.metadata
import platform
from datetime import UTC, datetime

from pipeline import __version__, layout
from pipeline.artifact import MANIFEST, read_manifest
from pipeline.errors import VerificationError
from pipeline.fingerprint import fingerprint, sha256
from pipeline.job import Job
from pipeline.log import Lease, LogEntry
from pipeline.manifest import ArtifactManifest, Evaluation, MergeRecord, SnapshotManifest, TrainedManifest, to_bytes
from pipeline.storage import Storage

VERSIONED = (
    "faiss-cpu",
    "faiss-gpu",
    "numpy",
    "pyarrow",
    "ray",
    "sentence-transformers",
    "tokenizers",
    "torch",
    "transformers",
)


def content_name(snapshot: SnapshotManifest, trained: TrainedManifest, encoder: str) -> str:
    """Identity of what an artifact holds: equal for equal corpus, encoder and trained index."""
    return fingerprint({"artifact": 1, "snapshot": snapshot.snapshot, "trained": trained.trained, "encoder": encoder})


def live_artifact(storage: Storage, entry: LogEntry | None) -> ArtifactManifest | None:
    """Manifest of the artifact that a commit names, its hash checked; None without a commit."""
    if entry is None or entry.artifact is None:
        return None
    path = f"{layout.artifact(entry.artifact)}/{MANIFEST}"
    try:
        data = storage.read(path)
    except FileNotFoundError as error:
        raise VerificationError(
            f"{storage.at(path)}: missing, commit {entry.number} names it; restore it or roll back"
        ) from error
    if sha256(data) != entry.manifest_sha256:
        raise VerificationError(
            f"{storage.at(path)}: its bytes are not those of commit {entry.number}; restore it or roll back"
        )
    return read_manifest(data, storage.at(path))


def write_manifest(
    job: Job, snapshot: SnapshotManifest, trained: TrainedManifest, merged: MergeRecord, evaluation: Evaluation
) -> ArtifactManifest:
    """Compose and store the manifest: from here on the folder is an artifact."""
    manifest = ArtifactManifest(
        version=merged.version,
        content=content_name(snapshot, trained, job.spec.fingerprint),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        snapshot=snapshot.snapshot,
        limit=snapshot.limit,
        counts=snapshot.counts | merged.counts,
        encoder=job.spec.as_dict() | {"fingerprint": job.spec.fingerprint},
        dim=trained.dim,
        index=trained,
        files=merged.files,
        records=merged.records,
        evaluation=evaluation,
        config=job.config.model_dump(mode="json", exclude={"store": {"s3"}}),
        versions=_versions(),
    ).sealed()
    if not job.storage.create(f"{layout.artifact(merged.version)}/{MANIFEST}", to_bytes(manifest)):
        check_unused(job.storage, merged.version)
    return manifest


def check_unused(storage: Storage, version: str) -> None:
    """Raise VerificationError when there is an artifact of this version: published files are never touched again."""
    path = f"{layout.artifact(version)}/{MANIFEST}"
    if storage.exists(path):
        raise VerificationError(
            f"{storage.at(path)}: already there, but the log does not know its epoch; restore log/ of this root"
        )


def check_gate(manifest: ArtifactManifest, min_recall: float) -> None:
    """Raise VerificationError when recall is under the gate; tiny corpora are reported and not gated."""
    found = manifest.evaluation
    if found.gated and found.recall < min_recall:
        raise VerificationError(
            f"artifact {manifest.version}: recall@{found.k} is {found.recall:.4f}, publish.min_recall is {min_recall}; "
            "nothing went live, raise index.m or search.nprobe or lower the gate"
        )


def commit(lease: Lease, storage: Storage, manifest: ArtifactManifest) -> LogEntry:
    """Make a verified artifact live."""
    data = storage.read(f"{layout.artifact(manifest.version)}/{MANIFEST}")
    return lease.commit(manifest.version, sha256(data))


def _versions() -> dict[str, str]:
    installed = {
        dist.metadata["Name"].lower(): dist.version for dist in importlib.metadata.distributions() if dist.metadata["Name"]
    }
    found = {name: installed[name] for name in VERSIONED if name in installed}
    return {"vecmill": __version__, "python": platform.python_version(), "machine": platform.machine()} | found
