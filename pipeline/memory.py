"""How much memory a process takes at most during a piece of work: its own pages, libraries included, not mapped files."""

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

STATUS = Path("/proc/self/status")
SAMPLE_S = 0.02
LINE_BYTES = 1024
M_MMAP_THRESHOLD = -3
LARGE_BYTES, LARGEST_BYTES = 1 << 20, 1 << 25


def give_back() -> None:
    """Return what was freed to the system, where malloc keeps it (glibc): the next step does not come on top of it."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


@contextlib.contextmanager
def frugal_malloc() -> Iterator[None]:
    """Large blocks are returned as they are freed (glibc); else malloc keeps the more, the larger they were.

    Afterwards blocks of 32 MiB are, as after a while in any process.
    """
    limit = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)
    limit(M_MMAP_THRESHOLD, LARGE_BYTES)
    try:
        yield
    finally:
        limit(M_MMAP_THRESHOLD, LARGEST_BYTES)


@dataclass
class Peak:
    """``size_bytes``: the most, looked at every 20 ms; None while the work goes on, and where not Linux."""

    size_bytes: int | None = None


@contextlib.contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure a block."""
    found = Peak()
    if not STATUS.is_file():
        yield found
        return
    most = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(SAMPLE_S):
            most = max(most, anonymous_bytes())

    watcher = threading.Thread(target=watch, daemon=True, name="vecmill-memory")
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        found.size_bytes = max(most, anonymous_bytes())


def anonymous_bytes() -> int:
    """Resident memory of this process without mapped files."""
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * LINE_BYTES for line in lines if line.startswith("RssAnon:"))
