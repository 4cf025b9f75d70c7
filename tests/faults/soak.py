"""Hours of change, reindex, crash and search on an S3 server; ``python tests/faults/soak.py MINUTES [SEED]``. No pytest.

What a machine at 3 a.m. goes through, drawn at random: documents come, change and go; the command runs through, through a
network that breaks requests, or is killed with all its processes after a random time; a worker dies; garbage is collected, an
earlier artifact is put live again. After every step what is live must be one whole corpus that a run has read, every passage
in it once with its own text, vector and code; after a run that ended well it is the present one, and random documents must
find themselves. At the end storage must hold no more than a fresh root with the same corpus does, and some.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HOME = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HOME))

from pipeline.artifacts.audit import audit
from pipeline.artifacts.live import open_live
from pipeline.artifacts.publish import live_artifact
from pipeline.client import Artifact
from pipeline.config import Config
from pipeline.config_file import parse_config
from pipeline.errors import ConfigError
from pipeline.operations import upkeep
from pipeline.root.storage import Storage
from pipeline.run import reindex
from tests.conftest import TOPICS, S3Server, save_first_layer, seaweed, write_jsonl
from tests.faults.proxy import FaultProxy, faults_before
from tests.faults.sessions import alive_of, end_session

TTL_S = 5.0
DOCUMENTS, FILES, CHANGES = 400, 6, 60
LONGEST_RUN_S, LATEST_KILL_S = 300, 40
OFTEN = 0.7
"""Of the steps begin with a change."""
BROKEN_SHARE = 0.02
SPARE = 1.5
"""Times the bytes of a fresh root that an old one may have after a collection that keeps the live artifact."""


class Soak:
    """A root, what its corpus is, and which corpora a run may have published."""

    def __init__(self, folder: Path, server: S3Server, proxy: FaultProxy, seed: int) -> None:
        self.folder, self.server, self.proxy = folder, server, proxy
        self.rng = random.Random(seed)
        self.corpus: dict[str, str] = {}
        self.published: set[frozenset[tuple[str, str]]] = set()
        self.before: frozenset[tuple[str, str]] | None = None
        self.rolled_back = False
        self.count = Counter[str]()
        self.numbers = 0
        save_first_layer(folder / "model")

    def settings(self, name: str = "soak", *, broken: bool = False) -> dict[str, Any]:
        """What a config file says; a config told again would hide the keys of the store."""
        s3 = self.server.store["s3"] | ({"endpoint_url": self.proxy.endpoint} if broken else {})
        return {
            "root": f"s3://test/{name}", "corpus": {"uri": str(self.folder / "corpus")}, "store": {"s3": s3},
            "encoder": {"model": str(self.folder / "model")}, "publish": {"max_shrink": 1, "min_recall": 0.5},
            "index": {"kind": "ivfpq", "nlist": 8, "m": 32, "lexical": True},
            "compute": {"lease_ttl_s": TTL_S, "unit_passages": 64},
        }  # fmt: skip

    def config(self, name: str = "soak") -> Config:
        return parse_config(self.settings(name))

    def change(self) -> None:
        """Some documents come, change or go, and all files are written anew."""
        for _ in range(self.rng.randrange(CHANGES)):
            name = f"d{self.rng.randrange(DOCUMENTS)}"
            if name in self.corpus and self.rng.random() < 0.4:
                del self.corpus[name]
            else:
                self.numbers += 1
                words = " ".join(self.rng.choices(TOPICS, k=self.rng.randrange(3, 60)))
                self.corpus[name] = f"Note {self.numbers} of {name} on {words}."
        rows = [{"id": name, "text": text} for name, text in self.corpus.items()]
        for number in range(FILES):
            write_jsonl(self.folder / "corpus" / f"{number}.jsonl", rows[number::FILES])

    def start(self, *, broken: bool = False) -> subprocess.Popen[bytes]:
        file = self.folder / "config.json"
        file.write_text(json.dumps(self.settings(broken=broken)))
        command = [sys.executable, "-m", "jobs", "reindex", "-q", "-c", str(file)]
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(command, cwd=HOME, stdout=log, stderr=log, start_new_session=True)

    def run(self, *, broken: bool = False) -> None:
        """The command through to its end: what is live is then the present corpus."""
        process = self.start(broken=broken)
        try:
            code = process.wait(LONGEST_RUN_S)
        finally:
            end_session(process)
        assert code == 0, self.log()
        assert self.live() == self.present, "what is live is not the present corpus"

    def kill(self) -> None:
        """The command and all that it started, after a random time: what is live is what was, or the present corpus."""
        process = self.start()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                assert process.wait(self.rng.uniform(1, LATEST_KILL_S)) == 0, self.log()
        finally:
            end_session(process)

    def kill_worker(self) -> None:
        """One of its processes: the run goes on, or ends in an error, and the next one makes it good."""
        process = self.start()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(self.rng.uniform(5, LATEST_KILL_S))
        workers = {pid: command for pid in alive_of(process.pid) if b"ray::" in (command := command_of(pid))}
        if workers:
            victim = self.rng.choice(list(workers))
            print("         kills", workers[victim].split(b"\0")[0].decode(), flush=True)
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        try:
            code = process.wait(LONGEST_RUN_S)
        finally:
            end_session(process)
        assert code == 0 or workers, self.log()
        self.count["run went on without a worker" if code == 0 else "run ended without a worker"] += bool(workers)

    def collect(self) -> None:
        upkeep.collect(self.config(), 2, 0.0, compact=self.rng.random() < 0.5)

    def roll_back(self) -> None:
        with contextlib.suppress(ConfigError):  # none was live before, or it is collected
            upkeep.rollback(self.config(), None)
            self.rolled_back = True

    def live(self) -> frozenset[tuple[str, str]] | None:
        """What the live artifact holds; every document is one passage here."""
        config = self.config()
        if live_artifact(Storage(config.root, config.store)) is None:
            return None
        batches = open_live(config).partition.documents.batches(["doc_id", "text"])
        return frozenset((row["doc_id"], row["text"]) for _, _, batch in batches for row in batch.to_pylist())

    @property
    def present(self) -> frozenset[tuple[str, str]]:
        """The corpus that a run would read."""
        return frozenset(self.corpus.items())

    def log(self) -> str:
        """The last that commands told."""
        return (self.folder / "log").read_text()[-3000:]

    def check(self) -> None:
        """Whatever happened: only a run moves on, to the present corpus, only a rollback moves back, to one that was live."""
        found = self.live()
        allowed = {self.before, self.present} | (self.published if self.rolled_back else set())
        assert found in allowed, "what is live is no corpus that may be"
        self.before, self.rolled_back = found, False
        if found is None:
            return
        self.published.add(found)
        assert audit(self.config(), 100).document_rows == len(found)
        artifact = Artifact(open_live(self.config()), self.config())
        for name, text in self.rng.sample(sorted(found), min(3, len(found))):
            assert artifact.search(text, 3, mode="hybrid")[0].doc_id == name, f"{name} does not find itself"

    def check_bytes(self) -> dict[str, int]:
        """An old root against a fresh one."""
        self.run()
        upkeep.collect(self.config(), 1, 0.0, compact=True)
        reindex(self.config("fresh"))
        sizes = {name: self.bytes(self.config(name)) for name in ("soak", "fresh")}
        assert sizes["soak"] <= SPARE * sizes["fresh"], sizes
        return sizes

    def bytes(self, config: Config) -> int:
        """Of all files under a root."""
        return sum(file.size_bytes for file in Storage(config.root, config.store).walk())


def command_of(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def main() -> None:
    minutes, seed = float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else int(time.time())
    print("seed", seed, flush=True)
    with tempfile.TemporaryDirectory(prefix="vm") as folder, seaweed() as server:
        with faults_before(server.endpoint, BROKEN_SHARE) as proxy:
            soak = Soak(Path(folder), server, proxy, seed)
            go_through(soak, minutes)
        told = {"minutes": minutes, "seed": seed, "steps": soak.count, "broken": proxy.broken, "bytes": soak.check_bytes()}
    print(json.dumps(told, indent=1))


def go_through(soak: Soak, minutes: float) -> None:
    steps: dict[str, tuple[int, Callable[[], None]]] = {
        "run": (4, soak.run),
        "run through faults": (2, lambda: soak.run(broken=True)),
        "kill": (4, soak.kill),
        "kill a worker": (2, soak.kill_worker),
        "collect": (1, soak.collect),
        "roll back": (1, soak.roll_back),
    }
    began = time.monotonic()
    while len(soak.corpus) < CHANGES:
        soak.change()
    while (now := (time.monotonic() - began) / 60) < minutes:
        if soak.rng.random() < OFTEN:
            soak.change()
        (name,) = soak.rng.choices(list(steps), [weight for weight, _ in steps.values()])
        print(f"{now:6.1f} min {name}, {len(soak.corpus)} documents", flush=True)
        soak.count[name] += 1
        steps[name][1]()
        soak.check()


if __name__ == "__main__":
    main()
