"""What a machine and a storage must be able to do, tried out."""

import contextlib
import importlib.metadata
import importlib.util
import shutil
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Config, StoreConfig
from pipeline.encoding.model import find_model
from pipeline.encoding.numerics import on_gpu
from pipeline.errors import VecmillError, VerificationError
from pipeline.root.storage import Storage

PACKAGES = ("ray", "torch", "sentence-transformers", "transformers", "tokenizers", "numpy", "pyarrow", "fsspec")
FAISS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cu13")
MIN_PYTHON = (3, 11)
FREE_BYTES = 5 << 30
ROUNDS, WRITERS = 20, 8


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ``advice``: what to do where it is not ``ok``."""

    what: str
    found: str
    ok: bool = True
    advice: str = ""


def examine(config: Config | None) -> Iterator[Finding]:
    """Python, packages, accelerators, and with a config its model, root and corpus."""
    version = ".".join(str(number) for number in sys.version_info[:3])
    yield Finding("python", version, sys.version_info >= MIN_PYTHON, "vecmill needs Python 3.11 or newer")
    for name in PACKAGES:
        yield _package(name)
    yield _faiss()
    yield _openvino()
    yield Finding("gpu", "there, with its driver" if on_gpu() else "none: encoders use CPUs")
    free = shutil.disk_usage(Path.cwd()).free
    yield Finding("disk", f"{free / 1e9:.1f} GB free here", free > FREE_BYTES, "Ray spills to disk; free some")
    if config is not None:
        yield _tried("model", lambda: str(find_model(config.encoder.model, config.encoder.revision).path))
        yield _tried("root", lambda: f"{len(Storage(config.root, config.store).list('log'))} log entries")
        yield _tried("corpus", lambda: f"{len(_corpus(config))} files")


def examine_storage(uri: str, store: StoreConfig) -> Iterator[Finding]:
    """Put, read back, list, delete, and above all create-if-absent, which writers race for; leaves nothing behind.

    Raises VerificationError at the end where the storage only pretends: two writers could then both go live.
    """
    storage = Storage(uri, store)
    folder = f"vecmill-doctor-{uuid.uuid4().hex[:12]}"
    try:
        storage.put(f"{folder}/put", b"one")
        storage.put(f"{folder}/put", b"two")
        yield Finding("read after write", "the last bytes", storage.read(f"{folder}/put") == b"two", "it shows old bytes")
        listed = storage.list(folder)
        yield Finding("list", f"{len(listed)} of 1", listed == [f"{folder}/put"], "it does not list what is there")
        storage.delete(f"{folder}/put")
        yield Finding("delete", "gone", not storage.exists(f"{folder}/put"), "it shows what was deleted")
        refused = storage.create(f"{folder}/once", b"first") and not storage.create(f"{folder}/once", b"second")
        kept = storage.read(f"{folder}/once") == b"first"
        race = _race(storage, folder)
    finally:
        for path in storage.list(folder):
            storage.delete(path)
        if storage.is_local:
            with contextlib.suppress(FileNotFoundError):  # nothing could be written
                Path(storage.at(folder)).rmdir()
    ok = refused and kept and race == ROUNDS
    found = f"{race} of {ROUNDS} races of {WRITERS} writers had one winner"
    yield Finding("create if absent", found, ok, "no run is safe here: use a store with conditional writes")
    if not ok:
        raise VerificationError(f"{storage.uri}: it does not create objects only if absent; use a store with If-None-Match")


def _race(storage: Storage, folder: str) -> int:
    """How many rounds had exactly one winner whose bytes are there."""
    good = 0
    for number in range(ROUNDS):
        winners: list[bytes] = []
        start = threading.Barrier(WRITERS)

        def write(me: bytes, path: str, winners: list[bytes] = winners, start: threading.Barrier = start) -> None:
            start.wait()
            if storage.create(path, me):
                winners.append(me)

        path = f"{folder}/race-{number}"
        threads = [threading.Thread(target=write, args=(f"writer {each}".encode(), path)) for each in range(WRITERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        good += winners == [storage.read(path)]
    return good


def _package(name: str) -> Finding:
    try:
        return Finding(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", ok=False, advice=f"pip install {name}")


def _faiss() -> Finding:
    there = [name for name in FAISS if importlib.util.find_spec("faiss") and _is_installed(name)]
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in there) or "not installed"
    advice = "install one of the extras cpu and gpu: both bring the module faiss, and two overwrite each other's files"
    return Finding("faiss", found, len(there) == 1, advice)


def _openvino() -> Finding:
    found = importlib.metadata.version("openvino") if _is_installed("openvino") else "not installed, CPUs encode with torch"
    return Finding("openvino", found)


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _corpus(config: Config) -> list[object]:
    from pipeline.ingest.listing import list_files

    return list(list_files(config.corpus.uri, config.store))


def _tried(what: str, attempt: Callable[[], str]) -> Finding:
    try:
        return Finding(what, attempt())
    except VecmillError as error:
        return Finding(what, str(error), ok=False, advice="mend the config")
