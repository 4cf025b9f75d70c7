"""The only door to files: local paths and every fsspec URI behind one small interface.

Promises: a put shows the whole object or nothing; ``create`` makes an object only if it is absent.
Nothing is ever written through ``fs.open(..., "wb")``: an exception inside commits the torn object on S3
(apache/arrow#40502). Nothing is trusted because a listing shows it.
"""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.config import S3Config, StoreConfig
from pipeline.errors import ConfigError, StorageError

SCHEMES = {"file": None, "s3": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "adls", "az": "adls", "memory": None}
"""Allowed URI schemes and the extra that brings each (fsspec knows 55, ssh and http among them)."""
WITHOUT_USER = ("s3", "gs", "gcs")
"""Schemes whose host is a bucket; in abfs:// the container stands before an @."""
REFUSALS = ("PreconditionFailed", "pre-conditions you specified")
"""How an S3 says that the object is already there (412); where it is being made by another (409) it is asked again."""
RANGE_BYTES, RANGES_AT_ONCE = 8 << 20, 8
"""Of a download: as much as that is in memory."""
CLIENT_MODULES = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure", "adlfs")


@dataclass(frozen=True)
class Stored:
    """A file under a storage: its path there, and when it was written in seconds by the storage's own clock."""

    path: str
    size_bytes: int
    modified_s: float


class Storage:
    """A folder at a URI. Paths are relative to it, with forward slashes."""

    def __init__(self, uri: str, store: StoreConfig | None = None) -> None:
        scheme = uri_scheme(uri)
        self._store = store or StoreConfig()
        options = _s3_options(self._store.s3) if scheme == "s3" else {}
        try:
            self.fs = fsspec.filesystem(scheme, use_listings_cache=False, **options)
        except ImportError as error:
            raise ConfigError(f"{uri}: {scheme}:// needs an extra; pip install 'vecmill[{SCHEMES[scheme]}]'") from error
        self._whole = {"max_concurrency": 1} if scheme == "s3" else {}  # else a body that breaks off is not read again
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self.uri = str(Path(strip_scheme(uri)).expanduser().absolute()) if self.is_local else uri.rstrip("/")

    def __reduce__(self) -> tuple[type["Storage"], tuple[str, StoreConfig]]:
        return Storage, (self.uri, self._store)

    def __repr__(self) -> str:
        return f"Storage({self.uri!r})"

    def at(self, path: str) -> str:
        """The full URI of ``path``, as fsspec and error texts take it."""
        return f"{self.uri}/{path}" if path else self.uri

    def read(self, path: str) -> bytes:
        """Whole object; raises FileNotFoundError, StorageError."""
        with self.explained("read", path):
            return self._read(path)

    def open(self, path: str, ahead_bytes: int | None = None) -> BinaryIO:
        """A seekable file for reading; the caller closes it.

        ``ahead_bytes``: what a remote one reads ahead at most and keeps; None: as its client does, s3fs 50 MB.
        """
        with self.explained("open", path):
            return cast(BinaryIO, self.fs.open(self.at(path), "rb", block_size=ahead_bytes))

    def exists(self, path: str) -> bool:
        """Whether an object is there now."""
        with self.explained("look for", path):
            return bool(self.fs.exists(self.at(path)))

    def walk(self, path: str = "") -> list[Stored]:
        """Every file below ``path``, sorted."""
        with self.explained("list", path):
            try:
                found = self.fs.find(self.at(path), detail=True)
            except FileNotFoundError:
                return []
        below = len(strip_scheme(self.uri).rstrip("/")) + 1
        return [
            Stored(strip_scheme(name)[below:], int(info["size"]), _modified(info))
            for name, info in sorted(found.items())
            if info["type"] == "file"
        ]

    def list(self, path: str) -> list[str]:
        """Paths of the files directly under ``path``, sorted; empty if there is no such folder."""
        with self.explained("list", path):
            try:
                names = self.fs.ls(self.at(path), detail=False, refresh=True)
            except FileNotFoundError:
                return []
        return sorted(f"{path}/{name.rstrip('/').rsplit('/', 1)[-1]}" for name in names)

    def delete(self, path: str) -> None:
        """Remove an object; one that is not there is no error."""
        with self.explained("delete", path), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.at(path))

    def put(self, path: str, data: bytes) -> None:
        """Write a whole object, replacing any."""
        with self.explained("write", path):
            if not self.is_local:
                self.fs.pipe_file(self.at(path), data)
                return
            temporary = self._write_temporary(path, data)
            temporary.replace(self.at(path))
            _sync_folder(Path(self.at(path)).parent)

    def create(self, path: str, data: bytes) -> bool:
        """Write a whole object only if none is there: True if this call made it. ``data`` is never empty."""
        if not data:
            raise ValueError(f"{path}: an empty object cannot be created exclusively (s3fs ignores the condition)")
        with self.explained("create", path):
            if not self.is_local:
                return self._create_remote(path, data)
            temporary = self._write_temporary(path, data)
            try:
                os.link(temporary, self.at(path))
            except FileExistsError:
                return False
            finally:
                temporary.unlink()
            _sync_folder(Path(self.at(path)).parent)
            return True

    def _create_remote(self, path: str, data: bytes) -> bool:
        """A client may retry a put whose answer was lost and be refused by its own object: reading back tells."""
        try:
            self.fs.pipe_file(self.at(path), data, mode="create")
        except (FileExistsError, OSError) as error:
            if not isinstance(error, FileExistsError) and not any(sign in str(error) for sign in REFUSALS):
                raise
            return self._read(path) == data
        return True

    def _read(self, path: str) -> bytes:
        return cast(bytes, self.fs.cat_file(self.at(path), **self._whole))

    def size(self, path: str) -> int | None:
        """Bytes of an object, None if there is none."""
        try:
            with self.explained("look for", path):
                return int(self.fs.size(self.at(path)))
        except FileNotFoundError:
            return None

    def adopt(self, path: str, local: Path) -> None:
        """Move a finished local file here as one object, replacing any."""
        with self.explained("write", path):
            if not self.is_local:
                self._upload(path, local)
                local.unlink()
                return
            target = Path(self.at(path))
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".tmp-", delete=False) as file:
                temporary = Path(file.name)
            try:
                shutil.move(local, temporary)
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
                temporary.chmod(0o644)
                temporary.replace(target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            _sync_folder(target.parent)

    def _upload(self, path: str, local: Path) -> None:
        """A large one goes in parts, and a store may not know an upload any more whose last answer was lost."""
        try:
            self.fs.put_file(str(local), self.at(path))
        except FileNotFoundError:
            if self.size(path) != local.stat().st_size:
                raise

    def fetch(self, path: str, local: Path) -> None:
        """Copy an object to a local file, some ranges of it at a time; whoever knows its hash should check what comes.

        Each range is a request that is made again when its body breaks off; s3fs's own downloads above 50 MB are not.
        """
        with self.explained("fetch", path):
            local.parent.mkdir(parents=True, exist_ok=True)
            if self.is_local:
                self.fs.get_file(self.at(path), str(local))
                return
            size = int(self.fs.size(self.at(path)))
            with local.open("wb") as file:
                for first in range(0, size, RANGES_AT_ONCE * RANGE_BYTES):
                    starts = list(range(first, min(size, first + RANGES_AT_ONCE * RANGE_BYTES), RANGE_BYTES))
                    ends = [min(size, start + RANGE_BYTES) for start in starts]
                    file.writelines(self.fs.cat_ranges([self.at(path)] * len(starts), starts, ends, on_error="raise"))

    def _write_temporary(self, path: str, data: bytes) -> Path:
        folder = Path(self.at(path)).parent
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".tmp-", delete=False) as file:
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.fchmod(file.fileno(), 0o644)
            except BaseException:
                Path(file.name).unlink()
                raise
        return Path(file.name)

    @contextlib.contextmanager
    def explained(self, action: str, path: str) -> Iterator[None]:
        """Turn what goes wrong in a block into FileNotFoundError or StorageError, naming the path."""
        try:
            yield
        except FileNotFoundError as error:
            if action in {"write", "create"}:
                raise StorageError(
                    f"{self.at(path)}: cannot {action} it, bucket or folder not found; check the root"
                ) from error
            raise FileNotFoundError(f"{self.at(path)}: not found") from error
        except OSError as error:
            raise StorageError(f"{self.at(path)}: cannot {action} it, {error}; check path, credentials and space") from error
        except Exception as error:
            if not type(error).__module__.startswith(CLIENT_MODULES):
                raise
            raise StorageError(f"{self.at(path)}: cannot {action} it, {error}; check endpoint and credentials") from error


def file_at(uri: str, store: StoreConfig) -> tuple[Storage, str]:
    """The folder that a file is in, and its name there."""
    folder, slash, name = uri.rpartition("/")
    return Storage(folder or slash or ".", store), name


def uri_scheme(uri: str) -> str:
    """The scheme of a URI (``file`` for plain paths); raises ConfigError on one that is not allowed or is chained."""
    if "::" in uri:
        raise ConfigError(f"{_without_secrets(uri)}: chained URIs are not supported; give a plain one")
    scheme = urlsplit(uri).scheme if "://" in uri else "file"
    if scheme not in SCHEMES:
        raise ConfigError(f"{_without_secrets(uri)}: scheme {scheme}:// is not supported; use one of {', '.join(SCHEMES)}")
    if scheme in WITHOUT_USER and "@" in urlsplit(uri).netloc:
        raise ConfigError(f"{_without_secrets(uri)}: a URI holds no credentials; give them in the environment or by a role")
    return scheme


def _without_secrets(uri: str) -> str:
    """A URI as it may be shown: without user, password and query, where signatures are."""
    return re.sub(r"://[^/]*@", "://...@", uri.partition("?")[0] if "://" in uri else uri)


def _s3_options(s3: S3Config) -> dict[str, Any]:
    from pipeline.root import retries  # imports s3fs

    options = retries.install()
    if s3.endpoint_url:
        options["endpoint_url"] = s3.endpoint_url
    if s3.region:
        options["client_kwargs"] = {"region_name": s3.region}
    if s3.key and s3.secret:
        options |= {"key": s3.key.get_secret_value(), "secret": s3.secret.get_secret_value()}
    return options


def strip_scheme(uri: str) -> str:
    """A URI's path with its bucket."""
    return uri.split("://", 1)[1] if "://" in uri else uri


def _modified(info: dict[str, Any]) -> float:
    names = ("LastModified", "mtime", "updated", "last_modified", "created")
    value = next((info[name] for name in names if info.get(name) is not None), 0.0)
    value = datetime.fromisoformat(value) if isinstance(value, str) else value
    return value.timestamp() if isinstance(value, datetime) else float(value)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
