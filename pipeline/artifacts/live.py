"""The live artifact on this machine: found through the log, copied here when it is remote, opened, asked."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from pipeline.artifacts.artifact import MANIFEST, check_sizes, read_manifest, verify, verify_file
from pipeline.artifacts.cache import Hold, cached
from pipeline.artifacts.publish import committed_artifact, require_live
from pipeline.config import Config, SearchConfig, StoreConfig
from pipeline.encoding.model import EncoderSpec, resolve_spec
from pipeline.errors import ConfigError, VerificationError
from pipeline.root import layout
from pipeline.root.log import Log, LogEntry
from pipeline.root.manifest import ArtifactManifest, InputFile, OperatingPoint, SnapshotManifest, load
from pipeline.root.storage import Storage
from pipeline.search.partition import LocalPartition, ordinals_of, share_of
from pipeline.search.searcher import Searcher


@dataclass(frozen=True)
class Opened:
    """An artifact ready to be searched, wherever its partitions are. ``spec``: its encoder; ``files``: its folder."""

    manifest: ArtifactManifest
    searcher: Searcher
    spec: EncoderSpec
    files: Storage


@dataclass(frozen=True)
class OpenedHere(Opened):
    """One that lies here as a whole. ``hold``: on the copy of a remote one."""

    partition: LocalPartition
    hold: Hold | None = None


@dataclass(frozen=True)
class OpenedShare:
    """A share of an artifact on this machine. ``version``: the artifact's name; ``hold``: on the copy of a remote one."""

    version: str
    partition: LocalPartition
    hold: Hold | None


Elsewhere = Callable[[ArtifactManifest, OperatingPoint], Searcher]
"""Makes the searcher of an artifact whose partitions are in other processes, once they have opened it."""


def live_snapshot(storage: Storage) -> SnapshotManifest | None:
    """The snapshot of the live artifact; None where nothing is live. Raises VerificationError where it is no longer there."""
    entry = Log(storage).refresh().live
    if entry is None or entry.artifact is None:
        return None
    path = f"{layout.artifact(entry.artifact)}/{MANIFEST}"
    manifest = load(ArtifactManifest, storage, path)
    snapshot = load(SnapshotManifest, storage, layout.snapshot(manifest.snapshot)) if manifest else None
    if snapshot is None:
        gone = storage.at(layout.snapshot(manifest.snapshot) if manifest else path)
        raise VerificationError(f"{gone}: missing, commit {entry.number} rests on it; restore it")
    return snapshot


def known_files(storage: Storage) -> tuple[InputFile, ...]:
    """Input files of the live artifact's snapshot, whose content is known without reading."""
    with contextlib.suppress(VerificationError):  # then every file is read
        snapshot = live_snapshot(storage)
        return snapshot.files if snapshot else ()
    return ()


def manifest_of(config: Config | None, artifact: str | None) -> ArtifactManifest:
    """Of the artifact at a URI, else of what is live. Raises ConfigError where there is none."""
    if artifact is not None:
        return _manifest_at(Storage(artifact, config.store if config else None), "")[0]
    if config is None:
        raise ConfigError("serve: give config (a path) or artifact (a URI)")
    return require_live(Storage(config.root, config.store))


def open_live(config: Config) -> OpenedHere:
    """Open what the last commit names; the config's encoder must be of its space. ConfigError where nothing is live."""
    storage = Storage(config.root, config.store)
    return _open(config, storage, require_live(storage))


def open_commit(config: Config, entry: LogEntry, current: Opened | None = None, elsewhere: Elsewhere | None = None) -> Opened:
    """Open what a commit names, every byte of it verified; of ``current``, where that is the same artifact measured again.

    With ``elsewhere`` no file is opened here but the manifest. Raises VerificationError where it is broken, ConfigError where
    it is of another encoder than the config's.
    """
    storage = Storage(config.root, config.store)
    manifest = committed_artifact(storage, entry)
    if current is not None and manifest.checksum == current.manifest.checksum:
        return replace(current, manifest=manifest)
    if elsewhere is not None:
        spec = config_spec(config, manifest)
        searcher = elsewhere(manifest, search_point(manifest, config.search))
        return Opened(manifest, searcher, spec, Storage(storage.at(layout.artifact(manifest.version)), config.store))
    if storage.is_local:  # a remote one is verified when it is copied here
        verify(storage, layout.artifact(manifest.version))
    return _open(config, storage, manifest)


def _open(config: Config, storage: Storage, manifest: ArtifactManifest) -> OpenedHere:
    spec = config_spec(config, manifest)
    folder, hold = _local_folder(storage, layout.artifact(manifest.version), config.search)
    return _opened_here(folder, manifest, config.search, spec, hold)


def _opened_here(
    folder: Path, manifest: ArtifactManifest, search: SearchConfig, spec: EncoderSpec, hold: Hold | None
) -> OpenedHere:
    partition = LocalPartition(folder, manifest)
    searcher = Searcher([partition], manifest, search_point(manifest, search))
    return OpenedHere(manifest, searcher, spec, Storage(str(folder)), partition, hold)


def open_uri(
    uri: str,
    search: SearchConfig | None = None,
    store: StoreConfig | None = None,
    *,
    trust_remote_code: bool = False,
    verified: bool = False,
) -> OpenedHere:
    """Open an artifact folder wherever it is; the model named in its manifest must be on this machine.

    ``trust_remote_code``: whether that model may run code of its own, which an artifact cannot decide for you. ``verified``:
    read every byte of a local folder first; a remote one is verified when it is copied here.
    """
    search = search or SearchConfig()
    storage = Storage(uri, store)
    if verified and storage.is_local:
        verify(storage, "")
    folder, hold = _local_folder(storage, "", search)
    manifest = read_manifest((folder / MANIFEST).read_bytes(), storage.at(MANIFEST))
    spec = _trusted_spec(uri, manifest, trust_remote_code=trust_remote_code)
    return _opened_here(folder, manifest, search, spec, hold)


def open_uri_elsewhere(
    uri: str, search: SearchConfig, store: StoreConfig | None, elsewhere: Elsewhere, *, trust_remote_code: bool = False
) -> Opened:
    """The same for an artifact whose partitions are in other processes."""
    files = Storage(uri, store)
    manifest, _ = _manifest_at(files, "")
    spec = _trusted_spec(uri, manifest, trust_remote_code=trust_remote_code)
    searcher = elsewhere(manifest, search_point(manifest, search))
    return Opened(manifest, searcher, spec, files)


def open_share(storage: Storage, folder: str, search: SearchConfig, number: int, count: int) -> OpenedShare:
    """Open partition ``number`` of ``count`` of an artifact, its files verified: on a remote store no others are copied here.

    Of the vectors it keeps its own rows, but reads the whole file, because that is what can be verified. Raises
    VerificationError, ConfigError where the artifact cannot be cut so.
    """
    manifest, data = _manifest_at(storage, folder)
    share = share_of(manifest, number, count).model_copy(update={"report": {}})
    if not storage.is_local:
        local, hold = cached(storage, folder, share, data, search, ordinals_of(share.parts))
        return OpenedShare(share.version, LocalPartition(local, share), hold)
    for name, file in share.files.items():
        verify_file(storage, f"{folder}/{name}".lstrip("/"), file)
    return OpenedShare(share.version, LocalPartition(Path(storage.at(folder)), share), None)


def _trusted_spec(uri: str, manifest: ArtifactManifest, *, trust_remote_code: bool) -> EncoderSpec:
    spec = spec_of(manifest)
    if spec.trust_remote_code and not trust_remote_code:
        raise ConfigError(
            f"{uri}: its model {spec.query_model or spec.model} runs code of its own; search with a config that has "
            "encoder.trust_remote_code: true if you trust it"
        )
    return spec


def config_spec(config: Config, manifest: ArtifactManifest) -> EncoderSpec:
    """The encoder of a config; raises ConfigError unless the artifact was made with it."""
    spec, _ = resolve_spec(**config.encoder_request(), precision=manifest.encoder["precision"])
    if spec.query_space != manifest.encoder.get("query_space"):
        raise ConfigError(
            f"{config.root}: artifact {manifest.version} was made for queries by {manifest.encoder.get('query_model')}, "
            f"the config has {spec.query_model}; run vecmill reindex or mend the config"
        )
    if spec.space != manifest.encoder["space"]:
        raise ConfigError(
            f"{config.root}: artifact {manifest.version} was made with {manifest.encoder['model']}, max_tokens "
            f"{manifest.encoder['max_tokens']}, prompt {manifest.encoder['document_prompt']!r}, pooled windows of "
            f"{manifest.encoder.get('window')} that share {manifest.encoder.get('overlap')}; the config's encoder "
            f"({spec.model}, {spec.max_tokens}, {spec.document_prompt!r}, {spec.window} that share {spec.overlap}) is another; "
            "run vecmill reindex or mend the config"
        )
    return spec


def spec_of(manifest: ArtifactManifest) -> EncoderSpec:
    """The encoder that an artifact was made with."""
    known = {field.name for field in fields(EncoderSpec)}
    return EncoderSpec(**{name: value for name, value in manifest.encoder.items() if name in known})


def search_point(manifest: ArtifactManifest, search: SearchConfig) -> OperatingPoint:
    """The settings of a search that names none: the measured point, less what the config says."""
    point = manifest.evaluation.point
    wanted = {"nprobe": search.nprobe, "rescore": search.rescore}
    return point.model_copy(update={name: value for name, value in wanted.items() if value is not None})


def _local_folder(storage: Storage, folder: str, search: SearchConfig) -> tuple[Path, Hold | None]:
    """The artifact as a local folder: in place, or a verified copy in the cache with what keeps it there."""
    manifest, data = _manifest_at(storage, folder)
    if not storage.is_local:
        return cached(storage, folder, manifest, data, search)
    check_sizes(storage, folder, manifest.all_files)
    return Path(storage.at(folder)), None


def _manifest_at(storage: Storage, folder: str) -> tuple[ArtifactManifest, bytes]:
    """The manifest in a folder, and its bytes."""
    path = f"{folder}/{MANIFEST}".lstrip("/")
    try:
        data = storage.read(path)
    except FileNotFoundError as error:
        raise ConfigError(f"{storage.at(folder)}: no {MANIFEST} there, so no artifact; check the path") from error
    return read_manifest(data, storage.at(path)), data


def query_spec(opened: Opened, config: Config | None) -> EncoderSpec:
    """The spec for encoding queries; a query prompt in the config wins over the artifact's."""
    prompt = config.encoder.query_prompt if config else None
    return opened.spec if prompt is None else replace(opened.spec, query_prompt=prompt)
