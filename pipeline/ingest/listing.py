"""Listing input files: what is there, what tells that it changed, what its bytes are."""

import contextlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import StoreConfig
from pipeline.errors import BadFileError, ConfigError, StorageError
from pipeline.fingerprint import sha256_file
from pipeline.root.storage import Storage, file_at, strip_scheme, uri_scheme

LOST_FOUND = "lost+found"
"""At the root of a volume, for the administrator alone."""


@dataclass(frozen=True)
class FileInfo:
    """A file as the storage describes it. ``stamp``: the etag, on local disk the modification time in ns.

    ``hidden``: a name or folder below the listed URI starts with ``.`` or ``_`` (``_SUCCESS``, ``_temporary``, ``.crc``).
    """

    uri: str
    size_bytes: int
    stamp: str
    hidden: bool = False


def list_files(uri: str, store: StoreConfig) -> list[FileInfo]:
    """Every regular file at a URI (file, folder with all below it, or glob), sorted by URI.

    Raises ConfigError when there is none but hidden ones, naming the nearest folder that exists, StorageError where a folder
    cannot be read.
    """
    storage = Storage(uri, store)
    root = storage.uri
    with storage.explained("list", ""):
        if any(mark in root for mark in "*[") and not storage.fs.exists(root):
            found = storage.fs.glob(root, detail=True)
            base = re.split(r"[*\[]", root, maxsplit=1)[0].rpartition("/")[0]
        else:
            is_folder = storage.is_local and Path(root).is_dir()
            found = _local_files(root) if is_folder else storage.fs.find(root, detail=True)
            base = root.rpartition("/")[0] if [strip_scheme(root)] == [strip_scheme(name) for name in found] else root
    prefix = strip_scheme(base).rstrip("/") + "/"
    files: list[FileInfo] = []
    for name, info in sorted(found.items()):
        if info["type"] == "file":
            with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                stamp, hidden = _stamp(name, info, storage), _is_hidden(name.removeprefix(prefix))
                files.append(FileInfo(_full_uri(name, storage), int(info["size"]), stamp, hidden))
    if all(file.hidden for file in files):
        raise ConfigError(f"{uri}: no input files there; {_nearest(storage, root)}")
    return files


def content_hash(file: FileInfo) -> str:
    """Identity of a file's bytes: its etag, on local disk their SHA-256. Raises BadFileError, StorageError."""
    if uri_scheme(file.uri) != "file":
        return file.stamp
    try:
        return sha256_file(Path(file.uri))
    except FileNotFoundError as error:
        raise BadFileError(f"{file.uri}: E_INPUT_CHANGED, it is gone since it was listed; run again") from error
    except OSError as error:
        raise StorageError(f"{file.uri}: cannot read it, {error}; check its permissions") from error


def stamp_now(uri: str, store: StoreConfig) -> tuple[int, str] | None:
    """Size and stamp of a file as it is now, None where it is gone."""
    storage, name = file_at(uri, store)
    try:
        with storage.explained("look for", name):
            info = storage.fs.info(storage.at(name))
            return int(info["size"]), _stamp(info["name"], info, storage)
    except FileNotFoundError:
        return None


def _local_files(folder: str) -> dict[str, dict[str, Any]]:
    """Every regular file below a folder. Raises OSError where a folder cannot be read that may have input; fsspec would not."""

    def stop(error: OSError) -> None:
        relative = str(error.filename).removeprefix(f"{folder}/")
        if not (isinstance(error, FileNotFoundError) or _is_hidden(relative) or relative == LOST_FOUND):
            raise error

    found: dict[str, dict[str, Any]] = {}
    for parent, _, names in os.walk(folder, onerror=stop):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                status = (path := Path(parent, name)).lstat()
                kind = "file" if stat.S_ISREG(status.st_mode) else "other"
                found[str(path)] = {"type": kind, "size": status.st_size}
    return found


def _full_uri(name: str, storage: Storage) -> str:
    return name if storage.is_local else f"{uri_scheme(storage.uri)}://{name.lstrip('/')}"


def _stamp(name: str, info: dict[str, Any], storage: Storage) -> str:
    if storage.is_local:
        return str(Path(name).stat().st_mtime_ns)
    etag = info.get("ETag") or info.get("etag") or info.get("md5Hash") or info.get("content_settings", {}).get("content_md5")
    return str(etag or info.get("created", "")).strip('"')


def _is_hidden(relative: str) -> bool:
    return any(part.startswith((".", "_")) for part in relative.split("/"))


def _nearest(storage: Storage, root: str) -> str:
    folder = root
    while "/" in strip_scheme(folder).strip("/"):
        folder = folder.rpartition("/")[0]
        if storage.fs.exists(folder):
            return f"the nearest folder that exists is {folder}"
    return "check the path"
