"""What a root needs besides runs: going back to an earlier artifact, and giving up files that nothing needs."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline import layout, publish
from pipeline.artifact import MANIFEST, read_manifest, verify, verify_file
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.job import new_run_id
from pipeline.log import Log, LogEntry, writing
from pipeline.manifest import ArtifactManifest, Evaluation, Record, SnapshotManifest, TrainedManifest, load
from pipeline.storage import Storage, Stored

if TYPE_CHECKING:
    from collections.abc import Callable

COLLECTED = ("artifacts", layout.SNAPSHOTS, layout.PASSAGES, layout.EMBEDDINGS, "trained", "shards", "runs", layout.BEATS)
"""Folders of a root that gc looks into; whatever else is there is not ours."""
LEFTOVERS = (".tmp-", ".scratch-")


@dataclass
class Collected:
    """What gc deleted, or would: files and bytes by folder of the root."""

    kept: tuple[str, ...]
    files: dict[str, int] = field(default_factory=dict)
    size_bytes: dict[str, int] = field(default_factory=dict)


def rollback(config: Config, to: str | None, say: "Callable[[str], None]" = lambda _: None) -> ArtifactManifest:
    """Make an earlier artifact live again: ``to``, or the one before the live one. It is verified first, byte by byte.

    Raises ConfigError where there is none, VerificationError where it is damaged.
    """
    storage = Storage(config.root, config.store)
    with writing(storage, new_run_id(), config.compute.lease_ttl_s, say) as lease:
        entry = _target(storage, Log(storage).refresh(), to)
        manifest = verify(storage, layout.artifact(str(entry.artifact)))
        if entry.evaluation is not None:
            path = layout.run(entry.run, entry.evaluation.name)
            verify_file(storage, path, entry.evaluation)
            manifest = manifest.model_copy(update={"evaluation": load(Evaluation, storage, path)})
        publish.commit(lease, storage, manifest, measured_again=entry.evaluation is not None)
        return manifest


def collect(
    config: Config, keep: int, grace_s: float, *, dry_run: bool = False, say: "Callable[[str], None]" = lambda _: None
) -> Collected:
    """Delete what the last ``keep`` live artifacts do not need and what is older than the grace period, by the storage's clock.

    Holds the root, so that no run can be using what it deletes. Manifests go first, records before their data: whatever
    remains of a gc that was killed is found by the next one.
    """
    storage = Storage(config.root, config.store)
    if dry_run:
        return _collect(storage, config, keep, grace_s, None, dry_run=True)
    with writing(storage, new_run_id(), config.compute.lease_ttl_s, say) as lease:
        return _collect(storage, config, keep, grace_s, lease.epoch, dry_run=False)


def _collect(storage: Storage, config: Config, keep: int, grace_s: float, epoch: int | None, *, dry_run: bool) -> Collected:
    log = Log(storage).refresh()
    commits = _last_commits(log, keep)
    found = Collected(kept=tuple(str(entry.artifact) for entry in commits))
    needed = set(_needed(storage, commits))
    files = storage.walk()
    now = max((file.modified_s for file in files), default=0.0)  # an entry of the log at the latest
    shared = config.store.embeddings is not None
    doomed = [
        file
        for file in files
        if file.path not in needed and _is_collected(file, now - grace_s, epoch, with_embeddings=not shared)
    ]
    for file in sorted(doomed, key=_order):
        folder = file.path.partition("/")[0]
        found.files[folder] = found.files.get(folder, 0) + 1
        found.size_bytes[folder] = found.size_bytes.get(folder, 0) + file.size_bytes
        if not dry_run:
            storage.delete(file.path)
    return found


def _order(file: Stored) -> tuple[int, str]:
    """Artifacts' manifests, then other JSON, then data."""
    name = file.path.rpartition("/")[2]
    return (0 if name == MANIFEST and file.path.startswith("artifacts/") else 1 if name.endswith(".json") else 2), file.path


def _is_collected(file: Stored, before_s: float, epoch: int | None, *, with_embeddings: bool) -> bool:
    folder, _, rest = file.path.partition("/")
    if folder == layout.BEATS:  # of writers that are gone: nobody else can hold the root now
        return epoch is not None and not rest.startswith(f"{epoch:012d}/")
    if any(part.startswith(LEFTOVERS) for part in file.path.split("/")):
        return file.modified_s < before_s
    return folder in COLLECTED and (with_embeddings or folder != layout.EMBEDDINGS) and file.modified_s < before_s


def _last_commits(log: Log, keep: int) -> list[LogEntry]:
    """The last commit of each of the last ``keep`` artifacts that were live, latest first."""
    found: dict[str, LogEntry] = {}
    for entry in log.backwards():
        if entry.kind == "commit" and entry.artifact and len(found) < keep:
            found.setdefault(entry.artifact, entry)
    return list(found.values())


def _needed(storage: Storage, commits: list[LogEntry]) -> Iterator[str]:
    """Paths of every file that these commits need, to be searched, rolled back to, or brought up to date."""
    for entry in commits:
        folder = layout.artifact(str(entry.artifact))
        yield f"{folder}/{MANIFEST}"
        if entry.evaluation:
            yield layout.run(entry.run, entry.evaluation.name)
        manifest = read_manifest(storage.read(f"{folder}/{MANIFEST}"), storage.at(folder))
        yield from (f"{folder}/{name}" for name in manifest.files)
        yield from _snapshot_files(storage, manifest.snapshot)
        yield from _trained_files(storage, manifest)
        store = f"{layout.EMBEDDINGS}/{manifest.encoder['fingerprint']}"
        for path in storage.list(store):
            record = load(Record, storage, path) if path.endswith(".json") else None
            if record and (record.unit in manifest.records or record.rejected):
                yield from _record_files(store, record)


def _snapshot_files(storage: Storage, name: str) -> Iterator[str]:
    yield layout.snapshot(name)
    snapshot = load(SnapshotManifest, storage, layout.snapshot(name))
    if snapshot is None:
        return
    yield from (f"{layout.SNAPSHOTS}/{file.name}" for file in (snapshot.masked, snapshot.rejected) if file)
    for generation in snapshot.generations:
        for unit in generation:
            record = load(Record, storage, layout.ingest_record(unit))
            if record:
                yield from _record_files(layout.PASSAGES, record)


def _trained_files(storage: Storage, manifest: ArtifactManifest) -> Iterator[str]:
    folder = layout.trained(manifest.index.trained)
    yield f"{folder}/manifest.json"
    trained = load(TrainedManifest, storage, f"{folder}/manifest.json")
    if trained and trained.file:
        yield f"{folder}/{trained.file.name}"
    shards = layout.index_shards(manifest.index.trained)
    for path in storage.list(shards):
        record = load(Record, storage, path) if path.endswith(".json") else None
        if record and record.unit in manifest.records:
            yield from _record_files(shards, record)


def _record_files(folder: str, record: Record) -> Iterator[str]:
    yield f"{folder}/{record.unit}.json"
    yield from (f"{folder}/{file.name}" for file in (*record.files, record.rejected, record.documents) if file)


def _target(storage: Storage, log: Log, to: str | None) -> LogEntry:
    live = log.live
    commits = [entry for entry in log.backwards() if entry.kind == "commit" and entry.artifact]
    if to is not None:
        entry = next((entry for entry in commits if entry.artifact == to), None)
        if entry is None:
            known = ", ".join(dict.fromkeys(str(entry.artifact) for entry in commits)) or "none"
            raise ConfigError(f"{storage.uri}: artifact {to} was never live; those that were: {known}")
        return entry
    for entry in commits:
        path = f"{layout.artifact(str(entry.artifact))}/{MANIFEST}"
        if live and entry.artifact != live.artifact and storage.exists(path):
            return entry
    raise ConfigError(f"{storage.uri}: no earlier artifact to go back to; those of gc are gone")
