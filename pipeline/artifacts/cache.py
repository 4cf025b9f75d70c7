"""Copies of remote artifacts on this machine: verified once, shared by processes, bounded in size.

One folder per artifact, named by the hash of its manifest, and a lock file beside it. Whoever has the artifact open holds the
lock shared, whoever copies or removes it holds it alone: an artifact is copied once however many processes ask for it, and none
is removed that is in use. Where room is short the longest unused go; one larger than all the room is kept all the same.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pipeline.ann.vectors import INT8, VECTORS
from pipeline.artifacts.artifact import MANIFEST, READ_BYTES, fetch_file, listed
from pipeline.config import SearchConfig
from pipeline.errors import StorageError, VerificationError
from pipeline.fingerprint import sha256
from pipeline.root.manifest import ArtifactManifest, DataFile
from pipeline.root.storage import Storage

COPYING = ".tmp-"
LOCK = ".lock"
ROWS_BY_ORDINAL = (VECTORS, INT8)
"""Files with a row of equal length for each ordinal."""
BLOCK_BYTES = 512
"""What ``st_blocks`` counts, whatever the file system."""

Hold = IO[bytes]
"""Keeps a copy from being removed until it is closed or collected."""


def cached(
    storage: Storage, folder: str, manifest: ArtifactManifest, data: bytes, search: SearchConfig, held: range | None = None
) -> tuple[Path, Hold]:
    """The local copy of a remote artifact, made if there is none. ``data``: the manifest's bytes.

    ``held``: the ordinals of a share of one, whose files ``manifest`` names; of the vectors only their rows are kept. Raises
    VerificationError where a file is missing or is not what the manifest says, StorageError where there is no room.
    """
    caches = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    cache = Path(search.cache_dir or f"{caches}/vecmill").expanduser()
    target = cache / (sha256(data)[:32] + (f"-{held.start}-{held.stop}" if held is not None else ""))
    lock = target.with_suffix(LOCK)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        while True:
            hold = _locked(lock, fcntl.LOCK_SH)
            if target.is_dir():
                os.utime(lock)
                return target, hold
            hold.close()
            with _locked(lock, fcntl.LOCK_EX):
                if not target.is_dir():
                    kept = {name: _kept(file, held) for name, file in manifest.all_files.items()}
                    _make_room(cache, target, sum(len(part) for part in kept.values()), search.cache_size)
                    _copy(storage, folder, manifest, kept, data, target)
    except OSError as error:
        raise StorageError(f"{target}: cannot be written, {error}; set search.cache_dir") from error


def _locked(file: Path, how: int) -> Hold:
    """A lock on the file that is there now: one that was removed while we waited for it locks nothing."""
    while True:
        hold = file.open("ab")
        try:
            fcntl.flock(hold, how)
            if os.path.samestat(os.fstat(hold.fileno()), file.stat()):
                return hold
        except FileNotFoundError:
            pass
        except BaseException:
            hold.close()
            raise
        hold.close()


def _kept(file: DataFile, held: range | None) -> range:
    """The bytes of a file that a copy has."""
    if held is None or file.name not in ROWS_BY_ORDINAL or not file.rows:
        return range(file.size_bytes)
    row_bytes = file.size_bytes // file.rows
    return range(row_bytes * held.start, row_bytes * held.stop)


def _copy(storage: Storage, folder: str, manifest: ArtifactManifest, kept: dict[str, range], data: bytes, target: Path) -> None:
    copy = target.with_name(COPYING + target.name)
    shutil.rmtree(copy, ignore_errors=True)  # of a process that was killed
    copy.mkdir()
    try:
        for name, file in manifest.all_files.items():
            path = f"{folder}/{name}".lstrip("/")
            if len(kept[name]) == file.size_bytes:
                fetch_file(storage, path, file, copy / name)
            else:
                with listed():
                    _copy_bytes(storage, path, file, kept[name], copy / name)
        (copy / MANIFEST).write_bytes(data)
        copy.replace(target)
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def _copy_bytes(storage: Storage, path: str, file: DataFile, kept: range, local: Path) -> None:
    """A file with some of its bytes in their place and holes around them, which take no room; all are read and verified."""
    digest, place = hashlib.sha256(), 0
    with storage.explained("fetch", path), storage.open(path) as source, local.open("wb") as out:
        while block := source.read(READ_BYTES):
            digest.update(block)
            first, end = max(kept.start - place, 0), min(kept.stop - place, len(block))
            if first < end:
                out.seek(place + first)
                out.write(block[first:end])
            place += len(block)
        out.truncate(file.size_bytes)
    if digest.hexdigest() != file.sha256:
        raise VerificationError(f"{storage.at(path)}: its bytes are not those of the manifest; restore or rebuild the artifact")


def _make_room(cache: Path, target: Path, wanted: int, limit: int) -> None:
    """Remove the longest unused copies until ``wanted`` more bytes are within the limit, and what killed processes left."""
    copies = (copy for copy in cache.iterdir() if copy.is_dir() and not copy.name.startswith(COPYING))
    for lock in sorted({*cache.glob(f"*{LOCK}"), *(copy.with_suffix(LOCK) for copy in copies)}, key=_last_use):
        copy = lock.with_suffix("")
        is_over = wanted + sum(_size(each) for each in cache.iterdir() if each.is_dir()) > limit
        if copy == target or (copy.is_dir() and not is_over):
            continue
        with contextlib.suppress(BlockingIOError), _locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
            shutil.rmtree(copy.with_name(COPYING + copy.name), ignore_errors=True)
            if copy.is_dir():
                copy.replace(copy.with_name(COPYING + copy.name))  # never seen half removed
                shutil.rmtree(copy.with_name(COPYING + copy.name))
            lock.unlink()


def _size(folder: Path) -> int:
    return sum(_stat_sizes(folder))


def _stat_sizes(folder: Path) -> Iterator[int]:
    with contextlib.suppress(FileNotFoundError):  # another process removes it
        for file in folder.rglob("*"):
            found = file.stat()
            yield min(found.st_size, found.st_blocks * BLOCK_BYTES) if file.is_file() else 0


def _last_use(lock: Path) -> float:
    try:
        return lock.stat().st_mtime
    except FileNotFoundError:  # another process has removed it
        return 0.0
