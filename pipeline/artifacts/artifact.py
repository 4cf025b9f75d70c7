"""The servable folder: assembled once, verified by hash, opened anywhere, searched.

Files: ``index.faiss`` (ids are ordinals), ``vectors.f16`` (n x dim little-endian float16 in ordinal order),
``documents.arrow`` (ordinal -> every document and passage with that text; of more than a million rows several files, as
of an index that does not fit the memory of its merge), ``manifest.json``. No pickle.
A folder without a manifest is no artifact; a published one is never touched again.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from pipeline.errors import VerificationError
from pipeline.fingerprint import sha256, sha256_file
from pipeline.root.manifest import ArtifactManifest, DataFile, parse
from pipeline.root.storage import Storage

MANIFEST = "manifest.json"
READ_BYTES = 8 << 20


def describe(file: Path, rows: int) -> DataFile:
    """Size and hash of a finished local file."""
    return DataFile(name=file.name, rows=rows, size_bytes=file.stat().st_size, sha256=sha256_file(file))


def describe_bytes(name: str, data: bytes) -> DataFile:
    """Size and hash of what is put as a whole."""
    return DataFile(name=name, rows=0, size_bytes=len(data), sha256=sha256(data))


def read_manifest(data: bytes, where: str) -> ArtifactManifest:
    """Parse a manifest and check its own checksum; raises VerificationError naming the file."""
    manifest = parse(ArtifactManifest, data, where)
    if not manifest.is_sealed(data):
        raise VerificationError(f"{where}: the manifest's checksum does not fit its content; restore or rebuild the artifact")
    return manifest


def verify(storage: Storage, folder: str) -> ArtifactManifest:
    """Read every byte of an artifact back; raises VerificationError naming the first file that is wrong, missing or foreign."""
    path = f"{folder}/{MANIFEST}".lstrip("/")
    try:
        manifest = read_manifest(storage.read(path), storage.at(path))
    except FileNotFoundError as error:
        raise VerificationError(f"{storage.at(folder)}: no {MANIFEST}, so no artifact; check the path") from error
    for name, expected in manifest.all_files.items():
        verify_file(storage, f"{folder}/{name}".lstrip("/"), expected)
    found = {file.path.removeprefix(f"{folder}/") for file in storage.walk(folder)}
    if strangers := found - set(manifest.all_files) - {MANIFEST}:
        raise VerificationError(f"{storage.at(folder)}/{min(strangers)}: not in the manifest; remove it")
    return manifest


def check_sizes(storage: Storage, folder: str, files: Mapping[str, DataFile]) -> None:
    """Raise VerificationError where one of an artifact's files is missing or was cut; its bytes are not read."""
    for name, file in files.items():
        if storage.size(path := f"{folder}/{name}".lstrip("/")) != file.size_bytes:
            raise VerificationError(
                f"{storage.at(path)}: missing or of another size than its manifest says; restore or rebuild the artifact"
            )


def fetch_file(storage: Storage, path: str, expected: DataFile, local: Path) -> None:
    """Copy a file to this machine; raises VerificationError unless size and SHA-256 are the expected ones."""
    with listed():
        storage.fetch(path, local)
    verify_file(Storage(str(local.parent)), local.name, expected)


@contextlib.contextmanager
def listed() -> Iterator[None]:
    """A block that copies what a manifest lists: VerificationError where it is not there."""
    try:
        yield
    except FileNotFoundError as error:
        raise VerificationError(f"{error}; the manifest lists it, restore or rebuild the artifact") from error


def verify_file(storage: Storage, path: str, expected: DataFile) -> None:
    """Read a file back; raises VerificationError unless size and SHA-256 are the expected ones."""
    digest = hashlib.sha256()
    try:
        with storage.open(path) as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
    except FileNotFoundError as error:
        raise VerificationError(
            f"{storage.at(path)}: missing, the manifest lists it; restore or rebuild the artifact"
        ) from error
    if digest.hexdigest() != expected.sha256:
        raise VerificationError(f"{storage.at(path)}: its bytes are not those of the manifest; restore or rebuild the artifact")
