"""Measures whole pipelines side by side, from JSON lines to an index that answers; writes wholes.json. An hour on 2 slow cores.

``python tests/benchmarks/wholes.py FOLDER``: FOLDER as for index.py; Daft and autofaiss in FOLDER/peers (see the Makefile).
The peers are the scripts in recipes/, each as its own documentation has it; the model is all-MiniLM-L6-v2 in FP32 everywhere,
and the index IVF-PQ of 48 bytes a vector or what a peer makes of that much memory. Measured are the wall time of the command,
the memory of its processes, recall@10 against exact search in its own vectors (vecmill and autofaiss at the setting that they
chose, others at an nprobe of a sixteenth of the lists), non-blank lines of what a user writes, what a ``kill -9`` at half the
time leaves, told by the time of the same command after it, and the same command after 1 % of the documents changed.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HOME = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HOME))

import faiss
import numpy as np

from pipeline.ann.vectors import to_float32
from pipeline.client import open_root
from pipeline.config_file import load_config
from pipeline.encoding.model import find_model
from tests.benchmarks import debian
from tests.benchmarks.machine import machine
from tests.benchmarks.processes import watched
from tests.conftest import MINILM, write_jsonl
from tests.faults.sessions import end_session

DOCUMENTS, FILES, QUERIES, K = 6_000, 8, 500, 10
RECIPES = Path(__file__).parent / "recipes"
PEERS = {
    "sentence-transformers and FAISS": "script.py",
    "multi-process pool": "pool.py",
    "Ray Data": "ray_data.py",
    "Daft": "daft_embed.py",
    "autofaiss": "auto.py",
}
NOT_HERE = {
    "clip-retrieval": "encodes images and captions; its index half is autofaiss",
    "pyserini": "needs a JVM and Lucene; it encodes with a script like the first row's",
    "NeMo Curator": "needs CUDA for its embedding stages",
    "lance-ray": "stores and indexes vectors; the encoding is Ray Data's recipe",
}


def main() -> None:
    folder = Path(sys.argv[1]).absolute()
    texts = debian.documents(folder)[:DOCUMENTS]
    model = str(find_model(MINILM).path)
    home = folder / "wholes"
    found: dict[str, Any] = {"measured": machine(), "documents": DOCUMENTS, "not_here": NOT_HERE, "pipelines": {}}
    ways: dict[str, Callable[[Path], list[str]]] = {"vecmill": ours} | {name: peer(file, model) for name, file in PEERS.items()}
    for name, command in ways.items():
        shutil.rmtree(home, ignore_errors=True)
        found["pipelines"][name] = measure(home, texts, command) | {"lines": lines(PEERS.get(name, "vecmill.yaml"))}
        print(name, json.dumps(found["pipelines"][name]), flush=True)
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


def ours(home: Path) -> list[str]:
    """The command over a config in ``home``."""
    settings = (RECIPES / "vecmill.yaml").read_text().replace("OUT", f"{home}/out").replace("CORPUS", f"{home}/corpus")
    (home / "vecmill.yaml").write_text(settings)
    return [sys.executable, "-m", "jobs", "reindex", "-q", "-c", str(home / "vecmill.yaml")]


def peer(file: str, model: str) -> Callable[[Path], list[str]]:
    return lambda home: [sys.executable, str(RECIPES / file), f"{home}/corpus", f"{home}/out", model]


def measure(home: Path, texts: list[str], command: Callable[[Path], list[str]]) -> dict[str, Any]:
    (home / "out").mkdir(parents=True)
    write_corpus(home, texts)
    first_s, peaks = timed(command(home), home)
    quality = recall_of(home)
    changed = [f"{text} Revised." if number % 100 == 0 else text for number, text in enumerate(texts)]
    write_corpus(home, changed)
    second_s, _ = timed(command(home), home)
    shutil.rmtree(home / "out")
    (home / "out").mkdir()
    write_corpus(home, texts)
    process = start(command(home), home)
    time.sleep(first_s / 2)
    end_session(process)
    after_s, _ = timed(command(home), home)
    return {
        "wall_s": first_s, "memory_bytes": peaks["all"], "recall": quality, "after_changes_s": second_s,
        "after_kill_s": after_s,
    }  # fmt: skip


def write_corpus(home: Path, texts: list[str]) -> None:
    rows = [{"id": str(number), "text": text} for number, text in enumerate(texts)]
    for number in range(FILES):
        write_jsonl(home / "corpus" / f"{number}.jsonl", rows[number::FILES])


def start(command: list[str], home: Path) -> "subprocess.Popen[bytes]":
    with (home / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=HOME, stdout=log, stderr=log, start_new_session=True)


def timed(command: list[str], home: Path) -> tuple[float, dict[str, int]]:
    """Wall seconds of a command, and the memory of its processes."""
    began = time.perf_counter()
    process = start(command, home)
    with watched(process.pid) as peaks:
        code = process.wait()
    seconds = round(time.perf_counter() - began, 1)
    end_session(process)
    if code:
        raise SystemExit(f"{command}: exit {code}\n{(home / 'log').read_text()[-3000:]}")
    return seconds, peaks


def recall_of(home: Path) -> float:
    """Recall@10 of an index over the vectors that were encoded for it; queries are documents, which find themselves too."""
    rng = np.random.default_rng(3)
    if (home / "vecmill.yaml").exists():
        artifact = open_root(load_config(home / "vecmill.yaml"))
        collection = artifact.opened.partition.collection
        vectors = to_float32(collection.vectors)
        queries = vectors[rng.choice(len(vectors), QUERIES, replace=False)]
        point = artifact.opened.searcher.point
        found = collection.search(queries, K, nprobe=point.nprobe, rescoring=point.rescore)[1]
    else:
        vectors = np.load(home / "out" / "vectors.npy")
        queries = vectors[rng.choice(len(vectors), QUERIES, replace=False)]
        index = faiss.read_index(str(home / "out" / "index.faiss"))
        inner = faiss.try_extract_index_ivf(index)
        if inner is not None and inner.nprobe == 1:  # nobody chose it
            inner.nprobe = max(1, inner.nlist // 16)
        found = index.search(queries, K)[1]
    truth = faiss.knn(queries, vectors, K, metric=faiss.METRIC_INNER_PRODUCT)[1]
    shared = [len(set(ours) & set(exact)) for ours, exact in zip(found.tolist(), truth.tolist(), strict=True)]
    return round(sum(shared) / (K * QUERIES), 4)


def lines(file: str) -> int:
    """Lines that a user writes: neither blank nor a comment nor what says what a file is."""
    told = [line for line in (RECIPES / file).read_text().splitlines() if line.strip()]
    return len([line for line in told if not line.startswith(("#", '"""'))])


if __name__ == "__main__":
    main()
