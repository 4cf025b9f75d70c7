"""What processes take while they run: memory, CPU, what they spill."""

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

INTERVAL_S = 0.2


@contextlib.contextmanager
def cpu_seconds() -> Iterator[list[float]]:
    """CPU seconds of the machine during a block, in a list of one."""
    before, told = _busy(), [0.0]
    yield told
    told[0] = _busy() - before


def _busy() -> float:
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def watched(driver: int) -> Iterator[dict[str, int]]:
    """Peaks of memory while a block runs: of the driver, of the largest worker, of all that it started together."""
    peaks = {"driver": 0, "worker": 0, "all": 0, "shared": 0}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(INTERVAL_S):
            sizes = {pid: memory for pid in descendants(driver) if (memory := memory_of(pid)) is not None}
            now = {
                "driver": sizes.get(driver, (0, 0))[0],
                "worker": max((own for pid, (own, _) in sizes.items() if pid != driver), default=0),
                "all": sum(own for own, _ in sizes.values()),
                "shared": max((shared for _, shared in sizes.values()), default=0),
            }
            for name, size in now.items():
                peaks[name] = max(peaks[name], size)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        over.set()
        thread.join()


def spilled_bytes(folder: Path) -> int:
    """What raylets whose logs are below a folder say they have spilled."""
    logs = (file.read_text(errors="replace") for file in folder.rglob("raylet*") if file.is_file())
    return max((int(size) << 20 for log in logs for size in re.findall(r"Spilled (\d+) MiB", log)), default=0)


def descendants(driver: int) -> Iterator[int]:
    """Processes that a command started, itself among them."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    for pid in parents:
        at: int | None = pid
        while at and at != driver:
            at = parents.get(at)
        if at == driver:
            yield pid


def memory_of(pid: int) -> tuple[int, int] | None:
    """Bytes of a process: its own, and shared memory that it has touched (the object store)."""
    with contextlib.suppress(OSError, KeyError):  # it may have ended
        status = Path(f"/proc/{pid}/status").read_text()
        lines = (line for line in status.splitlines() if line.startswith("Rss"))
        sizes = {line.partition(":")[0]: int(line.split()[1]) << 10 for line in lines}
        return sizes["RssAnon"], sizes["RssShmem"]
    return None
