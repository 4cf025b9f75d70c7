"""A service and a scheduler over many nights: neither may grow. ``python tests/faults/leaks.py TICKS``; 200 take an hour.

The scheduler is the command's own loop under a clock that is turned a minute on whenever it sleeps; each tick is a real run in
a process of its own, over a corpus that has changed. The service follows what it publishes and is asked meanwhile. After every
tick memory (pages of its own), open files, mapped files and threads of both are looked at: the most of the last quarter may not
be above the most of the first by more than 8 MB, which is what an allocator moves, and by two of the others. No pytest.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HOME = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HOME))

from jobs.schedule import Clock, Runner, _tell_text, follow
from pipeline.artifacts.publish import live_artifact
from pipeline.config_file import load_config
from pipeline.operations.schedule import Schedule
from pipeline.root.storage import Storage
from tests.benchmarks.processes import memory_of
from tests.benchmarks.service import Server, _until, served, together
from tests.conftest import save_first_layer, sentences, write_jsonl

DOCUMENTS = 300
ALLOWED_BYTES, ALLOWED = 8 << 20, 2
MEMORY = "own bytes"


class TurnedClock:
    """Time that passes by sleeping; a document changes meanwhile. Ends the process after so many sleeps."""

    def __init__(self, home: Path, ticks: int) -> None:
        self._home = home
        self._left = ticks
        self._turned = timedelta()

    def now(self) -> datetime:
        return datetime.now(UTC) + self._turned

    def sleep(self, seconds: float) -> None:
        if not self._left:
            raise SystemExit(0)
        change(self._home, self._left)
        self._left -= 1
        self._turned += timedelta(seconds=seconds + 1)


def change(home: Path, number: int) -> None:
    rows = list(sentences(DOCUMENTS))
    rows[number % DOCUMENTS] = {"id": f"n{number}", "text": f"Night {number} has a note of its own."}
    write_jsonl(home / "corpus" / "a.jsonl", rows)


def scheduled(home: Path, ticks: int) -> None:
    """The loop of ``vecmill schedule``, in a process of its own."""
    config, clock = str(home / "config.yaml"), TurnedClock(home, ticks)
    runner = Runner(load_config(config), ["reindex", "-c", config, "-q"], _tell_text)
    follow(Schedule("* * * * *"), runner, Clock(clock.now, clock.sleep))


def look(pid: int) -> dict[str, int]:
    """What a process holds."""
    memory, folder = memory_of(pid), Path(f"/proc/{pid}")
    assert memory is not None, f"process {pid} has ended"
    mapped = {line.split(maxsplit=5)[5] for line in (folder / "maps").read_text().splitlines() if "/artifacts/" in line}
    open_files, threads = (len(list((folder / name).iterdir())) for name in ("fd", "task"))
    return {MEMORY: memory[0], "open files": open_files, "mapped files of artifacts": len(mapped), "threads": threads}


def main() -> None:
    ticks = int(sys.argv[1])
    with tempfile.TemporaryDirectory(prefix="vm", dir="/tmp") as folder:
        home = Path(folder)
        save_first_layer(home / "model")
        change(home, 0)
        settings = {
            "root": str(home / "root"), "corpus": {"uri": str(home / "corpus")}, "encoder": {"model": str(home / "model")},
            "index": {"lexical": True}, "serve": {"poll_s": 0.2},
        }  # fmt: skip
        config = home / "config.yaml"
        config.write_text(json.dumps(settings))
        subprocess.run([sys.executable, "-m", "jobs", "reindex", "-q", "-c", str(config)], cwd=HOME, check=True)
        with served(config) as server:
            seen = nights(home, ticks, server)
    print(json.dumps({"ticks": len(seen["service"]), **{name: told(looks) for name, looks in seen.items()}}, indent=1))


def nights(home: Path, ticks: int, server: Server) -> dict[str, list[dict[str, int]]]:
    """What service and scheduler hold after each publish."""
    settings = load_config(home / "config.yaml")
    storage = Storage(settings.root, settings.store)
    seen: dict[str, list[dict[str, int]]] = {"service": [], "scheduler": []}
    scheduler = subprocess.Popen([sys.executable, __file__, "scheduled", str(home), str(ticks)], cwd=HOME)
    known = live_artifact(storage)
    try:
        while scheduler.poll() is None:
            found = live_artifact(storage)
            if found == known:
                time.sleep(0.2)
                continue
            known = found
            _until(server, found.version)
            answered = together(server, [{"queries": "a note on the glacier", "mode": "hybrid"}], 4, 1.0)
            assert answered["statuses"].keys() == {"200"}, answered
            if scheduler.poll() is not None:
                break
            for name, pid in (("service", server.pid), ("scheduler", scheduler.pid)):
                seen[name].append(look(pid))
            print(len(seen["service"]), seen["service"][-1], seen["scheduler"][-1], flush=True)
    finally:
        if scheduler.poll() is None:
            scheduler.terminate()
        code = scheduler.wait()
    assert code == 0, f"the scheduler ended with {code}"
    assert len(seen["service"]) >= ticks - 1, f"{ticks} ticks, {len(seen['service'])} artifacts"
    return seen


def told(looks: list[dict[str, int]]) -> dict[str, list[int]]:
    """Of each quantity the most after the first quarter and in the last; raises AssertionError where it has grown."""
    first, last = looks[: max(1, len(looks) // 4)], looks[-max(1, len(looks) // 4) :]
    found = {name: [max(look[name] for look in first), max(look[name] for look in last)] for name in looks[0]}
    for name, (before, after) in found.items():
        assert after <= before + (ALLOWED_BYTES if name == MEMORY else ALLOWED), f"{name}: {before}, {after}"
    return found


if __name__ == "__main__":
    if sys.argv[1] == "scheduled":
        scheduled(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
