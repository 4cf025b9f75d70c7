"""Measures the index beside hnswlib, usearch, LanceDB, autofaiss and FAISS; writes peers.json. About an hour on 2 cores.

``python tests/benchmarks/peers.py FOLDER STATIC_MODEL [--only NAME ...]``: FOLDER and vectors as for index.py, the corpus
``static``. hnswlib, usearch, lancedb and autofaiss must be importable (PYTHONPATH); they are no dependencies of vecmill.

Each is built in one process and searched in another, which opens it from disk: with the page cache emptied of its files
(cold), then again (warm). Its setting is the least of EFFORTS whose recall@10 is at least 0.95, or its best; latency is
the median of single queries on one thread. Memory of the index: anonymous memory that opening and searching added, and the
resident pages of its mapped files; the vectors that re-score candidates stand apart.
"""

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "LANCE_CPU_THREADS"):
    if multiprocessing.current_process().name == "search":
        os.environ[variable] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

HOME = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HOME))

import faiss
import numpy as np

from pipeline.ann import index
from pipeline.ann.collection import Collection
from pipeline.ann.index_parts import Parts
from pipeline.ann.index_plan import choose
from pipeline.ann.recall import drop_self, recall, score
from pipeline.ann.vectors import Readahead, open_vectors
from pipeline.config_what import IndexConfig
from tests.benchmarks.machine import machine

K, TARGET, COLD_QUERIES, TIMED = 10, 0.95, 50, 300
NPROBES = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
EF = (10, 20, 30, 40, 60, 80, 100, 150, 200, 300, 400, 600)
RESCORING = (5, 10, 20, 50)
Search = Callable[[Any, Any], Any]


class Vecmill:
    """Our own kinds; the plain IndexIVFPQ of FAISS is one of them, so it is re-scored in the same way."""

    efforts = tuple((nprobe, rescoring) for nprobe in NPROBES for rescoring in RESCORING)
    memory_files = ("index",)

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def build(self, vectors: Any, folder: Path) -> None:
        plan = choose(IndexConfig(**self.settings), len(vectors), vectors.shape[1])
        sample = np.random.default_rng(0).permutation(len(vectors))[: plan.train_vectors]
        data = index.train(plan, vectors[sample], 1234)
        codes = index.Trained(data).encode(vectors, "vectors")
        index.write(index.merge(data, plan.kind, [(codes, np.arange(len(codes)))]), folder / "index")

    def open(self, folder: Path, dim: int, count: int) -> Search:
        faiss.omp_set_num_threads(1)
        vectors = open_vectors(folder / "vectors.f16", dim)
        collection = Collection(
            Parts([(folder / "index", 0, count)], dim, mapped=self.settings.get("kind") == "ivfpq"),
            vectors,
            vectors,
            Readahead(folder / "vectors.f16", vectors.itemsize * dim),
        )
        return lambda queries, effort: collection.search(queries, K + 1, nprobe=effort[0], rescoring=effort[1])[1]


class Hnswlib:
    efforts = EF
    memory_files = ("index",)

    def build(self, vectors: Any, folder: Path) -> None:
        import hnswlib

        graph = hnswlib.Index(space="ip", dim=vectors.shape[1])
        graph.init_index(max_elements=len(vectors), M=16, ef_construction=200, random_seed=100)
        graph.add_items(vectors, np.arange(len(vectors)), num_threads=os.cpu_count())
        graph.save_index(str(folder / "index"))

    def open(self, folder: Path, dim: int, count: int) -> Search:
        import hnswlib

        graph = hnswlib.Index(space="ip", dim=dim)
        graph.load_index(str(folder / "index"), max_elements=count)

        def search(queries: Any, effort: int) -> Any:
            graph.set_ef(max(effort, K + 1))
            return graph.knn_query(queries, k=K + 1, num_threads=1)[0].astype(np.int64)

        return search


class Usearch:
    efforts = EF
    memory_files = ("index",)

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def _index(self, dim: int) -> Any:
        from usearch.index import Index

        return Index(ndim=dim, metric="ip", dtype=self.dtype)

    def build(self, vectors: Any, folder: Path) -> None:
        graph = self._index(vectors.shape[1])
        graph.add(np.arange(len(vectors)), vectors, threads=os.cpu_count())
        graph.save(str(folder / "index"))

    def open(self, folder: Path, dim: int, count: int) -> Search:
        graph = self._index(dim)
        graph.load(str(folder / "index"))

        def search(queries: Any, effort: int) -> Any:
            graph.expansion_search = effort
            found = graph.search(queries, K + 1, threads=1)
            return np.asarray(found.keys).reshape(len(queries), -1).astype(np.int64)

        return search


class LanceDb:
    """IVF_PQ at its defaults, refined from its own table."""

    efforts = tuple((nprobe, rescoring) for nprobe in (16, 32, 64, 128, 256) for rescoring in (10, 50))
    memory_files = ("lance",)

    def build(self, vectors: Any, folder: Path) -> None:
        import lancedb
        import pyarrow as pa

        rows = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        table = pa.table({"id": pa.array(np.arange(len(vectors))), "vector": rows})
        made = lancedb.connect(str(folder / "lance")).create_table("vectors", table)
        made.create_index(metric="dot", index_type="IVF_PQ")

    def open(self, folder: Path, dim: int, count: int) -> Search:
        import lancedb

        table = lancedb.connect(str(folder / "lance")).open_table("vectors")

        def one(query: Any, effort: tuple[int, int]) -> Any:
            found = table.search(query).distance_type("dot").nprobes(effort[0]).refine_factor(effort[1]).limit(K + 1)
            ids = found.select(["id"]).to_arrow().column("id").to_numpy()
            return np.pad(ids, (0, K + 1 - len(ids)), constant_values=-1)

        return lambda queries, effort: np.stack([one(query, effort) for query in queries])


class Autofaiss:
    """Given the bytes of our index and nothing else; it chooses and tunes its index itself."""

    efforts = (0,)
    memory_files = ("index",)

    def __init__(self, size: str) -> None:
        self.size = size

    def build(self, vectors: Any, folder: Path) -> None:
        import autofaiss

        matrix = faiss.OPQMatrix
        faiss.OPQMatrix = lambda d, **m_and_d2: matrix(d, *m_and_d2.values())  # autofaiss 2.18 names what FAISS 1.15 does not
        made, infos = autofaiss.build_index(
            vectors, save_on_disk=False, metric_type="ip", max_index_memory_usage=self.size, current_memory_available="20G",
            nb_cores=os.cpu_count(), verbose=30,
        )  # fmt: skip
        faiss.write_index(made, str(folder / "index"))
        (folder / "index_param").write_text(infos["index_param"])

    def open(self, folder: Path, dim: int, count: int) -> Search:
        faiss.omp_set_num_threads(1)
        made = faiss.read_index(str(folder / "index"))
        faiss.ParameterSpace().set_index_parameters(made, (folder / "index_param").read_text())
        return lambda queries, _: made.search(queries, K + 1)[1]


CONTENDERS: dict[str, Any] = {
    "vecmill ivfpqfs": Vecmill(),
    "vecmill ivfrabitq": Vecmill(kind="ivfrabitq"),
    "faiss IndexIVFPQ, re-scored": Vecmill(kind="ivfpq", m=64),
    "autofaiss at our bytes": Autofaiss("83MB"),
    "usearch f32": Usearch("f32"),
    "usearch bf16": Usearch("bf16"),
    "lancedb IVF_PQ": LanceDb(),
    "hnswlib": Hnswlib(),
}


def main() -> None:
    known_file = Path(__file__).with_suffix(".json")
    known = json.loads(known_file.read_text()) if known_file.is_file() else {"rows": {}}
    only = sys.argv[sys.argv.index("--only") + 1 :] if "--only" in sys.argv else list(CONTENDERS)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="vmpeers", dir=sys.argv[1]) as folder:
        prepare(Path(folder))
        for name in only:
            with tempfile.TemporaryDirectory(dir=folder) as own:
                (Path(own) / "vectors.f16").symlink_to(Path(folder) / "vectors.f16")
                row = in_process(context, "build", build_one, (name, own, folder))
                row |= in_process(context, "search", choose_one, (name, own, folder))
                row |= in_process(context, "search", serve_one, (name, own, folder, row["effort"])) if "effort" in row else {}
            known["rows"][name] = row
            known["measured"] = machine()
            print(name, json.dumps(row), flush=True)
            known_file.write_text(json.dumps(known, indent=1) + "\n")


def prepare(folder: Path) -> None:
    from tests.benchmarks.index import Corpus

    corpus = Corpus("static")
    corpus.stored.tofile(folder / "vectors.f16")
    np.savez(folder / "truth.npz", queries=corpus.truth.queries, scores=corpus.truth.scores, own=corpus.truth.own)


def in_process(context: Any, kind: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, Any]:
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=call, args=(send, function, arguments), name=kind)
    process.start()
    send.close()
    try:
        found = receive.recv()
    except EOFError:
        found = {"failed": f"{kind} ended with code {process.exitcode}"}
    process.join()
    return found


def call(send: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    send.send(function(*arguments))


def build_one(name: str, own: str, folder: str) -> dict[str, Any]:
    dim = np.load(Path(folder) / "truth.npz")["queries"].shape[1]
    vectors = open_vectors(Path(folder) / "vectors.f16", dim).astype(np.float32)
    started = time.perf_counter()
    CONTENDERS[name].build(vectors, Path(own))
    seconds = time.perf_counter() - started
    size = sum(path.stat().st_size for path in files_of(name, own))
    return {"build_s": round(seconds, 1), "index_bytes_per_vector": round(size / len(vectors), 1)}


def choose_one(name: str, own: str, folder: str) -> dict[str, Any]:
    """The fastest effort that reaches the target, else the one that finds most."""
    contender, truth = CONTENDERS[name], np.load(Path(folder) / "truth.npz")
    queries = truth["queries"]
    stored = open_vectors(Path(folder) / "vectors.f16", queries.shape[1])
    search = contender.open(Path(own), queries.shape[1], len(stored))
    row = sweep(contender, search, queries, truth, stored)[0]
    return {**row, "reached": row["recall@10"] >= TARGET}


def serve_one(name: str, own: str, folder: str, effort: Any) -> dict[str, Any]:
    """Open it with nothing in the page cache, ask, ask again; the memory that this took."""
    contender, queries = CONTENDERS[name], np.load(Path(folder) / "truth.npz")["queries"]
    dim = queries.shape[1]
    count = (Path(folder) / "vectors.f16").stat().st_size // (2 * dim)
    for path in [*files_of(name, own), Path(folder) / "vectors.f16"]:
        forget(path)
    before = memory("")
    started = time.perf_counter()
    search = contender.open(Path(own), dim, count)
    opened_s = time.perf_counter() - started
    cold = [timed(search, query, effort) for query in queries[-COLD_QUERIES:]]
    warm = sorted(timed(search, query, effort) for query in [*queries[:TIMED], *queries[:TIMED]])
    after = memory(own)
    return {
        "open_s": round(opened_s, 3),
        "first_query_ms": round(cold[0], 1),
        "cold_p50_ms": round(statistics.median(cold), 3),
        "p50_ms": round(statistics.median(warm), 3),
        "p99_ms": round(warm[int(0.99 * len(warm))], 3),
        "qps_one_thread": round(1000 * len(warm) / sum(warm)),
        "index_memory_bytes_per_vector": round((after[0] - before[0] + after[1]) / count, 1),
        "vectors_mapped_bytes_per_vector": round(after[2] / count, 1),
    }


def sweep(contender: Any, search: Search, queries: Any, truth: Any, stored: Any) -> list[dict[str, Any]]:
    """Recall of every effort that could be best, and the time of single queries for those that reach the target; by time."""
    rows = []
    for effort in contender.efforts:
        ids = np.concatenate([search(queries[first : first + 50], effort) for first in range(0, len(queries), 50)])
        _, ids = drop_self(np.zeros(ids.shape, np.float32), ids, truth["own"], K)
        found = recall(score(stored, queries, ids), truth["scores"]).mean
        rows.append({"effort": effort, "recall@10": round(float(found), 4)})
    reached = [row for row in rows if row["recall@10"] >= TARGET] or [max(rows, key=lambda row: row["recall@10"])]
    for row in reached[:8] if len(contender.efforts) > len(EF) else reached[:1]:
        row["p50_ms"] = statistics.median(timed(search, query, row["effort"]) for query in queries[:TIMED])
    return sorted((row for row in reached if "p50_ms" in row), key=lambda row: row["p50_ms"])


def timed(search: Search, query: Any, effort: Any) -> float:
    started = time.perf_counter()
    search(query[None, :], effort)
    return 1000 * (time.perf_counter() - started)


def files_of(name: str, own: str) -> Iterator[Path]:
    for file in CONTENDERS[name].memory_files:
        path = Path(own) / file
        yield from [path] if path.is_file() else (each for each in path.rglob("*") if each.is_file())


def forget(path: Path) -> None:
    """Have the page cache drop a file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def memory(own: str) -> tuple[int, int, int]:
    """Bytes of this process: anonymous, resident pages of mapped index files, of mapped vectors."""
    anonymous = index_pages = vector_pages = 0
    name = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if not fields[0].endswith(":"):
            name = fields[5] if len(fields) > 5 else ""
        elif fields[0] == "Anonymous:":
            anonymous += 1024 * int(fields[1])
        elif fields[0] == "Rss:" and name.endswith("vectors.f16"):
            vector_pages += 1024 * int(fields[1])
        elif fields[0] == "Rss:" and own and name.startswith(own):
            index_pages += 1024 * int(fields[1])
    return anonymous, index_pages, vector_pages


if __name__ == "__main__":
    main()
