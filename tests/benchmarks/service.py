"""Measures the search service over HTTP on 450,000 real texts; writes service.json. An hour, most of it encoding.

``python tests/benchmarks/service.py FOLDER``: FOLDER as for index.py; the corpus and its index are kept in it. Server and
clients share the machine's cores. Queries are spans of texts that are not in the corpus. Batched and one-at-a-time
encoding are measured in turns, A/B/A; the latter is the same service whose batches are closed at one text.
"""

import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HOME = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HOME))

import aiohttp
import numpy as np

from pipeline.artifacts.artifact import read_manifest
from pipeline.artifacts.publish import commit
from pipeline.client import open_root
from pipeline.config_file import load_config
from pipeline.root.log import writing
from pipeline.root.storage import Storage
from tests.benchmarks import debian
from tests.benchmarks.machine import machine

DOCUMENTS, QUERIES = 450_000, 2000
REQUESTS, SECONDS, PUBLISHES = 1000, 10.0, 50
EIGHTH = {"type": "eq", "key": "kind", "value": "a"}
HUNDREDTH = {"type": "and", "filters": [EIGHTH, {"type": "gt", "key": "chars", "value": 350}]}
JSON = {"content-type": "application/json"}
ARTIFACT = re.compile(rb'"artifact": ?"([^"]*)"')
SERVE = "import pipeline.service.query_encoder as each; {patch}; from jobs.__main__ import main; main()"


def main() -> None:
    home = Path(sys.argv[1]) / "service"
    config, queries = prepared(home)
    found: dict[str, Any] = {"measured": machine()}
    opened = open_root(load_config(config))
    found["corpus"] = opened.opened.manifest.counts | {"recall": opened.opened.manifest.evaluation.recall}
    vectors = opened.encode(queries).round(6).tolist()
    del opened
    with served(config) as server:
        found["one client"] = {
            "dense": one_by_one(server, [{"queries": query} for query in queries]),
            "lexical": one_by_one(server, [{"queries": query, "mode": "lexical"} for query in queries]),
            "hybrid": one_by_one(server, [{"queries": query, "mode": "hybrid"} for query in queries]),
            "vectors": one_by_one(server, [{"vectors": [vector]} for vector in vectors]),
            "filter, an eighth passes": one_by_one(server, [{"queries": query, "filter": EIGHTH} for query in queries]),
            "filter, a hundredth passes": one_by_one(server, [{"queries": query, "filter": HUNDREDTH} for query in queries]),
        }
        found["vectors only, 32 clients"] = together(server, [{"vectors": [vector]} for vector in vectors], 32)
        found["memory"] = server.memory()
    bodies = [{"queries": query} for query in queries]
    turns = [(name, patch) for name, patch in (("batched", "0"), ("one at a time", "each.BATCH_TEXTS = 1"), ("batched", "0"))]
    rates: dict[str, list[float]] = {"batched": [], "one at a time": []}
    for name, patch in turns:
        with served(config, patch) as server:
            rates[name].append(together(server, bodies, 32)["requests_per_s"])
    found["32 clients"] = rates | {"ratio": round(statistics.median(rates["batched"]) / rates["one at a time"][0], 2)}
    found["overload"] = overloaded(config, bodies)
    found["publishes"] = published(config, bodies)
    print(json.dumps(found, indent=1))
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


def prepared(home: Path) -> tuple[Path, list[str]]:
    """The config of an index of the corpus with two artifacts, made where it is not there yet, and queries."""
    texts = debian.documents_and_sentences(home.parent)
    rng, config = random.Random(7), home / "service.yaml"
    spans = (text.split() for text in texts[DOCUMENTS:])
    queries = [" ".join(words[at : at + 6]) for words in spans if len(words) > 8 for at in [rng.randrange(len(words) - 6)]]
    if not config.exists():
        (home / "corpus").mkdir(parents=True, exist_ok=True)
        for part in range(8):
            kind = "abcdefgh"[part]
            rows = (
                {"id": str(number), "text": texts[number], "kind": kind, "chars": len(texts[number])}
                for number in range(part, DOCUMENTS, 8)
            )
            (home / "corpus" / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        corpus = {"uri": str(home / "corpus"), "metadata": ["kind", "chars"]}
        config.write_text(json.dumps({"root": str(home / "root"), "corpus": corpus, "index": {"lexical": True}}))
    made = len(list((home / "root" / "artifacts").glob("*/manifest.json")))
    for command in (["reindex"], ["index", "--rebuild"])[made:]:
        subprocess.run([sys.executable, "-m", "jobs", *command, "-q", "-c", str(config)], check=True, cwd=HOME)
    return config, queries[:QUERIES]


class Server:
    """A service in a process of its own."""

    def __init__(self, url: str, pid: int) -> None:
        self.url = url
        self.pid = pid

    def memory(self) -> dict[str, int]:
        """Bytes: of its own pages, and with mapped files."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon", "VmRSS"))}
        return {"own": sizes["RssAnon"], "with mapped files": sizes["VmRSS"]}

    def ready(self) -> bool:
        return asyncio.run(_status(self.url)) == 200


@contextmanager
def served(config: Path, patch: str = "0", *settings: str) -> Iterator[Server]:
    port = 18000 + os.getpid() % 1000
    command = [sys.executable, "-c", SERVE.format(patch=patch), "serve", "-c", str(config), "--port", str(port)]
    for setting in settings:
        command += ["--set", setting]
    process = subprocess.Popen(command, cwd=HOME, stderr=subprocess.DEVNULL)
    server = Server(f"http://127.0.0.1:{port}", process.pid)
    try:
        while not server.ready():
            assert process.poll() is None, f"the service ended with {process.returncode}"
            time.sleep(0.2)
        together(server, [{"queries": "warm up"}], 4, 2.0)
        yield server
    finally:
        process.terminate()
        process.wait()


async def _status(url: str) -> int:
    try:
        async with aiohttp.ClientSession() as session, session.get(f"{url}/readyz") as answer:
            return answer.status
    except aiohttp.ClientError:
        return 0


def one_by_one(server: Server, bodies: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds of a request of one client that asks again when it has its answer."""
    times = np.array(asyncio.run(_sequence(server.url, bodies))) * 1000
    return {"requests": len(times), **{f"p{at}_ms": round(float(np.percentile(times, at)), 2) for at in (50, 95, 99)}}


async def _sequence(url: str, bodies: list[dict[str, Any]]) -> list[float]:
    times = []
    written = [json.dumps(body).encode() for body in bodies]
    async with aiohttp.ClientSession(headers=JSON) as session:
        for number in range(REQUESTS + 100):
            started = time.perf_counter()
            async with session.post(f"{url}/search", data=written[number % len(written)]) as answer:
                assert answer.status == 200, await answer.text()
                await answer.read()
            times.append(time.perf_counter() - started)
    return times[100:]


def together(server: Server, bodies: list[dict[str, Any]], clients: int, seconds: float = SECONDS) -> dict[str, Any]:
    """Requests per second of clients that each ask again when they have their answer, and the answers by status."""
    started = time.perf_counter()
    counts, times, versions = asyncio.run(_clients(server.url, bodies, clients, started + seconds))
    taken = time.perf_counter() - started
    return {
        "clients": clients,
        "requests_per_s": round(counts.get(200, 0) / taken, 1),
        "p99_ms": round(1000 * float(np.percentile(times, 99)), 1),
        "statuses": {str(status): count for status, count in sorted(counts.items())},
        "artifacts": len(versions),
    }


async def _clients(
    url: str, bodies: list[dict[str, Any]], clients: int, end: float
) -> tuple[dict[int, int], list[float], set[bytes]]:
    counts: dict[int, int] = {}
    times, versions = [], set()
    written = [json.dumps(body).encode() for body in bodies]

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        while time.perf_counter() < end:
            began = time.perf_counter()
            async with session.post(f"{url}/search", data=written[number % len(written)]) as answer:
                text = await answer.read()
            counts[answer.status] = counts.get(answer.status, 0) + 1
            times.append(time.perf_counter() - began)
            if answer.status == 200:
                versions.update(ARTIFACT.findall(text))
            number += clients

    async with aiohttp.ClientSession(headers=JSON, connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client(session, number) for number in range(clients)))
    return counts, times, versions


def overloaded(config: Path, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """64 clients without patience on a service that lets few wait; then one client again."""
    with served(config, "0", "serve.queue=8", "serve.threads=1") as server:
        before, calm = server.memory()["own"], one_by_one(server, bodies)
        flood = together(server, bodies, 64)
        return {
            "before": calm,
            "flood": flood,
            "after": one_by_one(server, bodies),
            "grown_bytes": server.memory()["own"] - before,
        }


def published(config: Path, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """Commits that name one of two artifacts in turn, under 8 clients; memory of the service's own pages after every ten."""
    settings = load_config(config)
    storage = Storage(settings.root, settings.store)
    folders = sorted(path.parent.name for path in Path(settings.root).glob("artifacts/*/manifest.json"))
    manifests = [
        read_manifest((Path(settings.root) / "artifacts" / name / "manifest.json").read_bytes(), name) for name in folders[-2:]
    ]
    memory = []
    with served(config, "0", "serve.poll_s=0.1") as server:
        outcome: dict[str, Any] = {}
        stop = threading.Event()

        def load() -> None:
            rounds = []
            while not stop.is_set():
                rounds.append(together(server, bodies, 8, 5.0))
            outcome["statuses"] = {
                status: sum(each["statuses"].get(status, 0) for each in rounds)
                for each in rounds
                for status in each["statuses"]
            }
            outcome["p99_ms"] = max(each["p99_ms"] for each in rounds)

        thread = threading.Thread(target=load)
        thread.start()
        for number in range(PUBLISHES):
            wanted = manifests[number % 2]
            with writing(storage, f"bench-{number}", 30, lambda _: None) as lease:
                commit(lease, storage, wanted)
            _until(server, wanted.version)
            if number % 10 == 9:
                memory.append(server.memory()["own"])
        stop.set()
        thread.join()
    return {"publishes": PUBLISHES, "own_bytes_after_each_ten": memory, **outcome}


def _until(server: Server, version: str) -> None:
    async def asked() -> str:
        async with aiohttp.ClientSession() as session, session.get(f"{server.url}/info") as answer:
            return str((await answer.json())["artifact"])

    deadline = time.monotonic() + 120
    while asyncio.run(asked()) != version:
        assert time.monotonic() < deadline, f"{version} was not served"
        time.sleep(0.1)


if __name__ == "__main__":
    main()
