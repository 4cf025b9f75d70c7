"""Measures the index against FAISS as its users set it up; writes index.json. About half an hour on 2 cores.

``python tests/benchmarks/index.py FOLDER STATIC_MODEL [--only build|search|centroids|growth]``

FOLDER keeps what is fetched (debian.py) and the vectors between runs. Corpora: ``minilm`` is 300,000 documents by
all-MiniLM-L6-v2 (384 dimensions), ``static`` about a million documents and sentences by the static model in the folder
STATIC_MODEL (256 dimensions). Queries are passages kept out of training; a passage is not its own neighbour.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HOME = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HOME))

import faiss
import numpy as np

from pipeline.ann import clustering, index, index_parts, operating
from pipeline.ann.collection import Collection
from pipeline.ann.index_plan import IndexPlan, choose
from pipeline.ann.recall import exact_search
from pipeline.config_what import IndexConfig
from tests.benchmarks import debian
from tests.benchmarks.machine import machine
from tests.conftest import MINILM

QUERIES, K, SEED = 1000, 10, 1234
ENCODED_AT_ONCE = 10_000
CORPORA = ("minilm", "static")
M_8BIT = {"minilm": 48, "static": 32}
PROBES = 64
SIZES = (10_000, 31_623, 100_000, 316_228)
SCANNED = (0.01, 0.03, 0.1)


def main() -> None:
    file = Path(__file__).with_suffix(".json")
    known = json.loads(file.read_text()) if file.is_file() else {}
    only = sys.argv[sys.argv.index("--only") + 1] if "--only" in sys.argv else None
    for name, part in {"build": build, "search": search, "centroids": centroids, "growth": growth}.items():
        if only in {None, name}:
            known[name] = {"measured": machine(), **{corpus: part(Corpus(corpus)) for corpus in CORPORA}}
            print(json.dumps({name: known[name]}, indent=1), flush=True)
            file.write_text(json.dumps(known, indent=1) + "\n")


class Corpus:
    """Unit vectors of real texts, float16 and float32, and held-out queries with their exact neighbours."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stored = vectors_of(name)
        self.vectors = self.stored.astype(np.float32)
        rng = np.random.default_rng(SEED)
        order = rng.permutation(len(self.vectors))
        self.held_out = np.sort(order[:QUERIES])
        self.others = order[QUERIES:]
        self.truth = operating.ground_truth(self.stored, self.vectors[self.held_out], self.held_out, K)
        self.dim = self.vectors.shape[1]

    def sample(self, count: int) -> Any:
        return self.vectors[self.others[:count]]

    def measure(self, file: Path, nprobe: int, rescoring: int) -> dict[str, float]:
        opened = index_parts.Parts([(file, 0, len(self.vectors))], self.dim)
        measured = operating.measure(
            Collection(opened, self.stored, self.stored), self.truth, 1, nprobe=nprobe, rescoring=rescoring
        )[0]
        return {"recall@10": round(measured.point.recall, 4), "ms": round(measured.point.latency_ms, 3)}


def vectors_of(name: str) -> Any:
    from pipeline.encoder import Encoder
    from pipeline.encoding.model import find_model, resolve_spec
    from pipeline.encoding.numerics import resolve_backend, resolve_here

    folder = Path(sys.argv[1])
    file = folder / f"{name}.npy"
    if not file.is_file():
        if name == "minilm":
            texts, model, precision = debian.documents(folder)[:300_000], MINILM, resolve_here("auto")
        else:
            texts, model, precision = debian.documents_and_sentences(folder), sys.argv[2], "fp32"
        backend = resolve_backend("auto", find_model(model), on_gpu=False, precision=precision)
        encoder = Encoder(resolve_spec(model=model, precision=precision, backend=backend)[0])
        parts = [
            encoder.encode_documents(texts[first : first + ENCODED_AT_ONCE]).astype(np.float16)
            for first in range(0, len(texts), ENCODED_AT_ONCE)
        ]
        np.save(file, np.concatenate(parts))
    return np.load(file)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    made = function()
    return made, time.perf_counter() - started


def ours(plan: IndexPlan, corpus: Corpus) -> tuple[Any, dict[str, float]]:
    """Train on a sample and turn all vectors into an index, as the stages do, on this process's threads."""
    data, train_s = timed(lambda: index.train(plan, corpus.sample(plan.train_vectors), SEED))
    codes, add_s = timed(lambda: index.Trained(data).encode(corpus.vectors, corpus.name))
    made, merge_s = timed(lambda: index.merge(data, plan.kind, [(codes, np.arange(len(codes)))]))
    return made, {"train_s": round(train_s, 1), "add_s": round(add_s, 1), "merge_s": round(merge_s, 2)}


def build(corpus: Corpus) -> dict[str, Any]:
    """Point 1: train and add at equal nlist and m, by FAISS's factory, by FAISS with SuperKMeans centroids, by us."""
    m = M_8BIT[corpus.name]
    plan = choose(IndexConfig(kind="ivfpq", m=m), len(corpus.vectors), corpus.dim)

    def by_factory(centroids: Any = None) -> Any:
        made = faiss.index_factory(corpus.dim, f"IVF{plan.nlist},PQ{m}x8", faiss.METRIC_INNER_PRODUCT)
        if centroids is not None:
            made.quantizer.add(centroids)
            made.quantizer_trains_alone = 0
        made.train(corpus.vectors[corpus.others])
        made.add(corpus.vectors)
        return made

    def with_super_kmeans() -> Any:
        settings = faiss.SuperKMeansParameters()
        settings.niter, settings.seed, settings.max_points_per_centroid = 10, SEED, 256
        kmeans = faiss.SuperKMeans(corpus.dim, plan.nlist, settings)
        kmeans.train(corpus.vectors[corpus.others])
        centroids = faiss.vector_to_array(kmeans.centroids).reshape(plan.nlist, corpus.dim)
        return by_factory(np.ascontiguousarray(centroids / np.linalg.norm(centroids, axis=1, keepdims=True)))

    contenders: dict[str, Callable[[], tuple[Any, dict[str, float]]]] = {
        "faiss factory": lambda: (by_factory(), {}),
        "faiss with SuperKMeans centroids": lambda: (with_super_kmeans(), {}),
        "vecmill": lambda: ours(plan, corpus),
    }
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, make in contenders.items():
            (made, parts), seconds = timed(make)
            index.write(made, file := Path(folder) / "index")
            rows[name] = {"seconds": round(seconds, 1), **parts}
            for rescoring in (0, 10):
                points = {str(nprobe): corpus.measure(file, nprobe, rescoring) for nprobe in (PROBES, PROBES * 5 // 4)}
                rows[name][f"by nprobe, rescore {rescoring}"] = points
            del made
    ratios = {f"times {name}": round(rows[name]["seconds"] / rows["vecmill"]["seconds"], 1) for name in rows}
    return {"vectors": len(corpus.vectors), "dim": corpus.dim, "nlist": plan.nlist, "m": m, "rows": rows, **ratios}


def search(corpus: Corpus) -> dict[str, Any]:
    """Point 3: what the kinds find, how fast, in how many bytes; each at the fastest setting for a recall."""
    rows: dict[str, Any] = {}
    for kind in ("ivfpqfs", "ivfpq", "ivfrabitq", "ivfsq8"):
        plan = choose(IndexConfig(kind=kind), len(corpus.vectors), corpus.dim)
        made, parts = ours(plan, corpus)
        with tempfile.TemporaryDirectory() as folder:
            index.write(made, file := Path(folder) / "index")
            opened, open_s = timed(lambda file=file: index_parts.Parts([(file, 0, len(corpus.vectors))], corpus.dim))
            measured = operating.measure(Collection(opened, corpus.stored, corpus.stored), corpus.truth, 0.995)
            rows[kind] = {"m": plan.m, **parts, "open_ms": round(1000 * open_s, 1)}
            rows[kind]["bytes_per_vector"] = round(file.stat().st_size / len(corpus.vectors), 1)
            for target in (0.9, 0.95, 0.99):
                point = operating.choose(measured, target, None).point
                rows[kind][f"recall {target}"] = {name: round(value, 4) for name, value in point.model_dump().items()}
    return {"vectors": len(corpus.vectors), "dim": corpus.dim, "rows": rows}


def centroids(corpus: Corpus) -> dict[str, Any]:
    """Flat and hierarchical k-means: seconds, and how many neighbours are in the near lists that hold so many vectors."""
    plan = choose(IndexConfig(), len(corpus.vectors), corpus.dim)
    sample = corpus.sample(plan.train_vectors)
    _, neighbours = exact_search(corpus.stored, corpus.truth.queries, K + 1)
    grouped = clustering.LISTS_PER_GROUP
    found: dict[str, Any] = {"nlist": plan.nlist, "sample": len(sample)}
    for name, lists_per_group in (("flat", plan.nlist), ("hierarchical", grouped)):
        clustering.LISTS_PER_GROUP = lists_per_group
        made, seconds = timed(lambda: clustering.train_centroids(sample, plan.nlist, SEED))
        lists = clustering.nearest(corpus.vectors, made)
        sizes = np.bincount(lists, minlength=plan.nlist)
        near = np.argsort(-(corpus.truth.queries @ made.T), axis=1)
        ranks = np.argsort(near, axis=1)
        rank = np.take_along_axis(ranks, lists[neighbours], axis=1)
        scanned = np.cumsum(sizes[near], axis=1).mean(axis=0)
        recalls = [(rank <= probe).mean() for probe in range(plan.nlist)]
        at = {f"{share:.0%}": round(float(np.interp(share * len(lists), scanned, recalls)), 4) for share in SCANNED}
        found[name] = {"seconds": round(seconds, 1), "recall of lists by share of vectors scanned": at}
    clustering.LISTS_PER_GROUP = grouped
    return found


def growth(corpus: Corpus) -> dict[str, Any]:
    """Point 5: seconds of the default build for growing parts of the corpus; exponents between neighbours."""
    rows = []
    for count in (*(size for size in SIZES if size < len(corpus.vectors)), len(corpus.vectors)):
        part = corpus.others[:count]
        vectors = corpus.vectors[part]
        plan = choose(IndexConfig(kind="ivfpqfs"), len(vectors), corpus.dim)
        data, train_s = timed(lambda plan=plan, vectors=vectors: index.train(plan, vectors[: plan.train_vectors], SEED))
        codes, add_s = timed(lambda data=data, vectors=vectors: index.Trained(data).encode(vectors, corpus.name))
        _, merge_s = timed(
            lambda data=data, plan=plan, codes=codes: index.merge(data, plan.kind, [(codes, np.arange(len(codes)))])
        )
        row = {"vectors": len(vectors), "nlist": plan.nlist, "train_s": round(train_s, 2), "add_s": round(add_s, 2)}
        row |= {"merge_s": round(merge_s, 2), "total_s": round(train_s + add_s + merge_s, 2)}
        if rows:
            steps = np.log([row["vectors"] / rows[-1]["vectors"], row["total_s"] / rows[-1]["total_s"]])
            row["exponent"] = round(float(steps[1] / steps[0]), 2)
        rows.append(row)
    ends = np.log([rows[-1][name] / rows[0][name] for name in ("vectors", "total_s")])
    return {"rows": rows, "exponent": round(float(ends[1] / ends[0]), 2)}


if __name__ == "__main__":
    main()
