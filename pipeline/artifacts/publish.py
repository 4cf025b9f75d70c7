"""Put an artifact live: manifest, verification of every stored byte, the recall gate, the commit."""

import contextlib
import importlib.metadata
import platform
from datetime import UTC, datetime

from pipeline import __version__
from pipeline.ann.drift import Verdict
from pipeline.artifacts.artifact import MANIFEST, check_sizes, read_manifest, verify_file
from pipeline.embed.coverage import Coverage
from pipeline.errors import ConfigError, DataError, VerificationError
from pipeline.fingerprint import fingerprint, sha256
from pipeline.root import layout
from pipeline.root.job import Event, Job
from pipeline.root.log import Lease, Log, LogEntry
from pipeline.root.manifest import (
    ArtifactManifest,
    DataFile,
    Evaluation,
    Merged,
    MergeRecord,
    SnapshotManifest,
    TrainedManifest,
    load,
    put_data,
    to_bytes,
)
from pipeline.root.storage import Storage

VERSIONED = (
    "bm25s",
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


def content_name(job: Job, coverage: Coverage, trained: TrainedManifest) -> str:
    """Identity of what an artifact holds: equal for equal corpus, encoders and index."""
    form = job.config.index.model_dump(mode="json", include={"partitions", "rescore"})
    form["lexical"] = job.config.index.language if job.config.index.lexical else None
    what = {"snapshot": coverage.snapshot.snapshot, "trained": trained.trained, "encoder": job.spec.fingerprint}
    what["left_out"] = sha256(coverage.left_out.tobytes())
    what["queries"] = fingerprint({"space": job.spec.query_space, "prompt": job.spec.query_prompt})
    return fingerprint({"artifact": 3, "form": form, **what})


def usable_live(job: Job) -> ArtifactManifest | None:
    """The live artifact, or None where there is none or it is damaged: then it is built anew, which ``say`` tells."""
    try:
        manifest = live_artifact(job.storage)
        if manifest:
            check_sizes(job.storage, layout.artifact(manifest.version), manifest.all_files)
    except VerificationError as error:
        job.say(Event("publish", f"the live artifact is damaged and will be built anew: {error}"))
        return None
    return manifest


def live_artifact(storage: Storage) -> ArtifactManifest | None:
    """Manifest of the artifact that the last commit names, its hash checked; None without a commit.

    An artifact that was measured again since comes with its last measurement.
    """
    entry = Log(storage).refresh().live
    return committed_artifact(storage, entry) if entry and entry.artifact else None


def committed_artifact(storage: Storage, entry: LogEntry) -> ArtifactManifest:
    """Manifest of the artifact that a commit names, its hash checked; VerificationError where it is not that one."""
    if entry.artifact is None:
        raise VerificationError(f"{storage.uri}: commit {entry.number} names no artifact; restore log/")
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
    manifest = read_manifest(data, storage.at(path))
    if entry.evaluation is None:
        return manifest
    path = layout.run(entry.run, entry.evaluation.name)
    verify_file(storage, path, entry.evaluation)
    return manifest.model_copy(update={"evaluation": load(Evaluation, storage, path)})


def require_live(storage: Storage) -> ArtifactManifest:
    """The live artifact's manifest; raises ConfigError where nothing is live."""
    manifest = live_artifact(storage)
    if manifest is None:
        raise ConfigError(f"{storage.uri}: nothing is live here; run vecmill reindex first")
    return manifest


def compose_manifest(
    job: Job, content: str, coverage: Coverage, trained: TrainedManifest, merged: MergeRecord, found: tuple[Evaluation, Verdict]
) -> ArtifactManifest:
    """The manifest of merged and evaluated files, not yet sealed nor stored."""
    snapshot, (evaluation, verdict) = coverage.snapshot, found
    carried = {name: getattr(merged, name) for name in Merged.model_fields} | {"counts": snapshot.counts | merged.counts}
    return ArtifactManifest(
        **carried,
        content=content,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        snapshot=snapshot.snapshot,
        limit=snapshot.limit,
        encoder=job.spec.as_dict() | {"fingerprint": job.spec.fingerprint},
        index=trained,
        evaluation=evaluation,
        baseline=verdict.baseline or evaluation,
        verdict=str(verdict),
        drifted=verdict.reasons,
        config=job.config.model_dump(mode="json", exclude={"store": {"s3"}}),
        versions=_versions(),
    )


def write_manifest(storage: Storage, draft: ArtifactManifest, report: dict[str, DataFile]) -> ArtifactManifest:
    """Store a manifest with its report: from here on the folder is an artifact."""
    manifest = draft.model_copy(update={"report": report}).sealed()
    if not storage.create(f"{layout.artifact(manifest.version)}/{MANIFEST}", to_bytes(manifest)):
        check_unused(storage, manifest.version)
    return manifest


def check_unused(storage: Storage, version: str) -> None:
    """Raise VerificationError when there is an artifact of this version: published files are never touched again."""
    path = f"{layout.artifact(version)}/{MANIFEST}"
    if storage.exists(path):
        raise VerificationError(
            f"{storage.at(path)}: already there, but the log does not know its epoch; restore log/ of this root"
        )


def check_shrink(job: Job, live: ArtifactManifest | None, snapshot: SnapshotManifest) -> None:
    """Raise DataError when too many of the live documents are gone: a half-empty export must not go live."""
    if live is None or live.limit is not None or snapshot.limit is not None:
        return
    before, now = live.counts["documents"], snapshot.counts["documents"]
    if now < (1 - job.config.publish.max_shrink) * before:
        raise DataError(
            f"{job.config.corpus.uri}: {now} documents, artifact {live.version} has {before}: more than publish.max_shrink "
            f"{job.config.publish.max_shrink:g} of them are gone; check the export, or allow it with --set publish.max_shrink=1"
        )


def check_gate(manifest: ArtifactManifest, min_recall: float) -> None:
    """Raise VerificationError when recall is under the gate; tiny corpora are reported and not gated."""
    found = manifest.evaluation
    if found.gated and found.recall < min_recall:
        raise VerificationError(
            f"artifact {manifest.version}: recall@{found.k} is {found.recall:.4f}, publish.min_recall is {min_recall}; "
            "nothing went live, raise index.m or search.nprobe or lower the gate"
        )


def commit(lease: Lease, storage: Storage, manifest: ArtifactManifest, *, measured_again: bool = False) -> LogEntry:
    """Make a verified artifact live, with the measurement that is in its manifest or a later one."""
    evaluation = None
    if measured_again:
        evaluation = put_data(storage, layout.run(lease.run, "evaluation"), ".json", to_bytes(manifest.evaluation), 0)
    data = storage.read(f"{layout.artifact(manifest.version)}/{MANIFEST}")
    return lease.commit(manifest.version, sha256(data), evaluation)


def _versions() -> dict[str, str]:
    found = {"vecmill": __version__, "python": platform.python_version(), "machine": platform.machine()}
    for name in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
