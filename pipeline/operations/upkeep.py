"""What a root needs besides runs: going back to an earlier artifact, and giving up files that nothing needs."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np

from pipeline.artifacts import publish
from pipeline.artifacts.artifact import MANIFEST, read_manifest, verify
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.ingest.snapshot import live_keys, parts, snapshot_of
from pipeline.operations import compaction
from pipeline.root import layout
from pipeline.root.job import embedding_store, new_run_id
from pipeline.root.log import Lease, Log, LogEntry, writing
from pipeline.root.manifest import ArtifactManifest, Record, SnapshotManifest, TrainedManifest, list_records, load
from pipeline.root.result import remembered
from pipeline.root.shards import Keys, is_among, read_keys
from pipeline.root.storage import Storage, Stored

if TYPE_CHECKING:
    from collections.abc import Callable

COLLECTED = ("artifacts", layout.SNAPSHOTS, layout.PASSAGES, layout.EMBEDDINGS, "trained", "shards", layout.RUNS, layout.BEATS)
"""Folders of a root that gc looks into; whatever else is there is not ours."""
LEFTOVERS = (".tmp-", ".scratch-")


@dataclass
class Collected:
    """What gc deleted, or would: files and bytes by folder of the root; how many embedding shards became how many."""

    kept: tuple[str, ...]
    shards_before: int = 0
    shards_after: int = 0
    files: dict[str, int] = field(default_factory=dict)
    size_bytes: dict[str, int] = field(default_factory=dict)


def rollback(config: Config, to: str | None, say: "Callable[[str], None]" = lambda _: None) -> ArtifactManifest:
    """Make an earlier artifact live again: ``to``, or the one before the live one. It is verified first, byte by byte.

    Raises ConfigError where there is none, VerificationError where it is damaged.
    """
    storage = Storage(config.root, config.store)
    with writing(storage, new_run_id(), config.compute.lease_ttl_s, say) as lease:
        entry = _target(storage, Log(storage).refresh(), to)
        verify(storage, layout.artifact(str(entry.artifact)))
        manifest = publish.committed_artifact(storage, entry)
        publish.commit(lease, storage, manifest, measured_again=entry.evaluation is not None)
        return manifest


def collect(
    config: Config,
    keep: int,
    grace_s: float,
    *,
    compact: bool = False,
    dry_run: bool = False,
    say: "Callable[[str], None]" = lambda _: None,
) -> Collected:
    """Delete what the last ``keep`` live artifacts do not need and what is older than the grace period, by the storage's clock.

    ``compact``: then make one embedding shard of many tiny ones, and write those anew that are mostly dead. Holds the root, so
    that no run can be using what it deletes. Manifests go first, records before their data: whatever remains of a gc that was
    killed is found by the next one.
    """
    if compact and config.store.embeddings:
        raise ConfigError(
            f"store.embeddings: {config.store.embeddings} is shared with other roots; gc --compact leaves it alone"
        )
    storage = Storage(config.root, config.store)
    if dry_run:
        return collect_held(storage, config, keep, grace_s, None, compact=compact)
    with writing(storage, new_run_id(), config.compute.lease_ttl_s, say) as lease:
        return collect_held(storage, config, keep, grace_s, lease, compact=compact)


def collect_held(
    storage: Storage, config: Config, keep: int, grace_s: float, lease: Lease | None, *, compact: bool = False
) -> Collected:
    """``collect`` by a caller who holds the root; None: only tell what would go."""
    log = Log(storage).refresh()
    files = storage.walk()
    epoch = lease.epoch if lease else None
    before_s = _now_s(files, epoch) - grace_s
    commits = _kept_commits(storage, log, keep, _young_artifacts(files, before_s))
    found = Collected(kept=tuple(str(entry.artifact) for entry in commits))
    embeddings = embedding_store(storage, config)
    needed = {*_needed(storage, embeddings, commits), *_told(log, commits, files), *remembered(storage, datetime.now(UTC))}
    shared = config.store.embeddings is not None
    doomed = [
        file for file in files if file.path not in needed and _is_collected(file, before_s, epoch, with_embeddings=not shared)
    ]
    for file in sorted(doomed, key=_order):
        folder = file.path.partition("/")[0]
        found.files[folder] = found.files.get(folder, 0) + 1
        found.size_bytes[folder] = found.size_bytes.get(folder, 0) + file.size_bytes
        if lease:
            lease.check()
            storage.delete(file.path)
    if compact:
        old = {file.path for file in files if file.path in needed and file.modified_s < before_s}
        _compact(storage, embeddings, commits, old, found, lease)
    return found


def _compact(
    storage: Storage, embeddings: Storage, commits: list[LogEntry], old: set[str], found: Collected, lease: Lease | None
) -> None:
    """Compact the shards of each encoder that kept artifacts have; those younger than the grace period stay as they are."""
    live: dict[str, Keys] = {}
    for entry in commits:
        folder = layout.artifact(str(entry.artifact))
        manifest = read_manifest(storage.read(f"{folder}/{MANIFEST}"), storage.at(folder))
        keys = live_keys(storage, parts(storage, snapshot_of(storage, manifest)))
        encoder = str(manifest.encoder["fingerprint"])
        live[encoder] = np.union1d(live[encoder], keys) if encoder in live else keys
    for encoder, keys in live.items():
        store = compaction.Store(storage, embeddings, encoder)
        records = [record for record in store.records() if f"{layout.EMBEDDINGS}/{encoder}/{record.unit}.json" in old]
        for shards in compaction.plan(store, keys, records):
            found.shards_before += len(shards)
            found.shards_after += 1 if not lease else store.rewrite(shards, lease) is not None


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


def _now_s(files: list[Stored], epoch: int | None) -> float:
    """By the storage's clock, which dated our acquire; where there is none, by that of this machine."""
    acquired = None if epoch is None else layout.log_entry(epoch)
    return next((file.modified_s for file in files if file.path == acquired), time.time())


def _young_artifacts(files: list[Stored], after_s: float) -> set[str]:
    """Those whose manifest stays because it is young: what they rest on may be older."""
    young = (file.path.split("/") for file in files if file.modified_s >= after_s)
    return {parts[1] for parts in young if parts[0] == "artifacts" and parts[2:] == [MANIFEST]}


def _kept_commits(storage: Storage, log: Log, keep: int, young: set[str]) -> list[LogEntry]:
    """The last commit of each of the last ``keep`` artifacts that were live, less those that are gone, and of the ``young``."""
    found: dict[str, LogEntry] = {}
    oldest = min((name.partition("-")[0] for name in young), default="")  # the epoch that an artifact was made in
    for entry in log.backwards():
        if len(found) >= keep and (not young or f"{entry.epoch:06d}" < oldest):
            break
        if entry.kind == "commit" and entry.artifact and (len(found) < keep or entry.artifact in young):
            found.setdefault(entry.artifact, entry)
    live, *earlier = found.values() if found else (None,)
    there = (entry for entry in earlier if storage.size(f"{layout.artifact(str(entry.artifact))}/{MANIFEST}") is not None)
    return [live, *there] if live else []


def _needed(storage: Storage, embeddings: Storage, commits: list[LogEntry]) -> Iterator[str]:
    """Paths of every file that these commits need, to be searched, rolled back to, or brought up to date."""
    for entry in commits:
        folder = layout.artifact(str(entry.artifact))
        yield f"{folder}/{MANIFEST}"
        manifest = read_manifest(storage.read(f"{folder}/{MANIFEST}"), storage.at(folder))
        yield from (f"{folder}/{name}" for name in manifest.all_files)
        yield from _snapshot_files(storage, manifest.snapshot)
        yield from _shard_files(storage, embeddings, manifest)


def _told(log: Log, commits: list[LogEntry], files: list[Stored]) -> Iterator[str]:
    """What the runs that made these artifacts, or measured them again, wrote about themselves; not the rows they left out."""
    kept = {entry.artifact for entry in commits}
    runs = {entry.run for entry in log.backwards() if entry.kind == "commit" and entry.artifact in kept}
    for file in files:
        folder, _, rest = file.path.partition("/")
        if folder == layout.RUNS and rest.partition("/")[0] in runs and file.path.endswith(".json"):
            yield file.path


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


def _shard_files(storage: Storage, embeddings: Storage, manifest: ArtifactManifest) -> Iterator[str]:
    """The trained index, and every shard that has a passage of the artifact."""
    folder = layout.trained(manifest.index.trained)
    yield f"{folder}/manifest.json"
    trained = load(TrainedManifest, storage, f"{folder}/manifest.json")
    if trained and trained.file:
        yield f"{folder}/{trained.file.name}"
    live = live_keys(storage, parts(storage, snapshot_of(storage, manifest)))
    encoder, shards = str(manifest.encoder["fingerprint"]), layout.index_shards(manifest.index.trained)
    for record in list_records(embeddings, encoder).values():
        files = (file for file in (*record.files, record.rejected) if file)
        if any(is_among(read_keys(embeddings, encoder, file), live).any() for file in files):
            yield from _record_files(f"{layout.EMBEDDINGS}/{encoder}", record)
            codes = load(Record, storage, f"{shards}/{record.unit}.json")
            yield from _record_files(shards, codes) if codes else ()


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
