"""Copies of remote artifacts on this machine: verified once, shared by processes, bounded in size.

One folder per artifact, named by the hash of its manifest, and a lock file beside it. Whoever has the artifact open holds the
lock shared, whoever copies or removes it holds it alone: an artifact is copied once however many processes ask for it, and none
is removed that is in use. Where room is short the longest unused go; one larger than all the room is kept all the same.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pipeline.artifact import MANIFEST, verify
from pipeline.config import SearchConfig
from pipeline.errors import StorageError, VerificationError
from pipeline.fingerprint import sha256
from pipeline.manifest import ArtifactManifest
from pipeline.storage import Storage

COPYING = ".tmp-"
LOCK = ".lock"

Hold = IO[bytes]
"""Keeps a copy from being removed until it is closed or collected."""


def cached(storage: Storage, folder: str, manifest: ArtifactManifest, data: bytes, search: SearchConfig) -> tuple[Path, Hold]:
    """The local copy of a remote artifact, made if there is none. ``data``: the manifest's bytes.

    Raises VerificationError where a file is missing or is not what the manifest says, StorageError where there is no room.
    """
    caches = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    cache = Path(search.cache_dir or f"{caches}/vecmill").expanduser()
    target = cache / sha256(data)[:32]
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
                    _make_room(cache, target, sum(file.size_bytes for file in manifest.all_files.values()), search.cache_size)
                    _copy(storage, folder, manifest, data, target)
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


def _copy(storage: Storage, folder: str, manifest: ArtifactManifest, data: bytes, target: Path) -> None:
    copy = target.with_name(COPYING + target.name)
    shutil.rmtree(copy, ignore_errors=True)  # of a process that was killed
    copy.mkdir()
    try:
        for name in manifest.all_files:
            storage.fetch(f"{folder}/{name}".lstrip("/"), copy / name)
        (copy / MANIFEST).write_bytes(data)
        verify(Storage(str(copy)), "")
        copy.replace(target)
    except FileNotFoundError as error:
        raise VerificationError(f"{error}; the manifest lists it, restore or rebuild the artifact") from error
    finally:
        shutil.rmtree(copy, ignore_errors=True)


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
            yield file.stat().st_size if file.is_file() else 0


def _last_use(lock: Path) -> float:
    try:
        return lock.stat().st_mtime
    except FileNotFoundError:  # another process has removed it
        return 0.0
