"""Measures what the README states of the whole job; writes spine.json beside this file. About ten minutes on 2 cores.

Speeds are ratios of medians over interleaved runs (A, B, A, B ...) with the quality of both beside them.
SciFact is read from ../shared/data; without it those rows are left out and the script says so.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HOME = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HOME))

import faiss
import numpy as np

from pipeline.ann import index, index_parts, operating
from pipeline.ann.collection import Collection
from pipeline.ann.index_plan import choose
from pipeline.artifacts.live import open_live
from pipeline.config_what import IndexConfig
from pipeline.run import reindex
from pipeline.search.evaluation import labelled
from tests.benchmarks.machine import machine
from tests.conftest import SHARED_DATA, make_config

ROUNDS = 3


def main() -> None:
    results: dict[str, Any] = {"machine": machine(), "noop": {}, "scifact": {}}
    with tempfile.TemporaryDirectory(prefix="vmbench") as folder:
        if (SHARED_DATA / "scifact").is_dir():
            results["scifact"], vectors = scifact(Path(folder))
            results["noop"] = noop(Path(folder))
            results["training"] = training(vectors)
        else:
            print("SciFact is not here: its rows are left out", file=sys.stderr)
    file = Path(__file__).with_suffix(".json")
    file.write_text(json.dumps(results, indent=1) + "\n")
    print(file.read_text())


def scifact(folder: Path) -> tuple[dict[str, Any], Any]:
    """nDCG@10 of exact search and of both index kinds on the 300 test queries; nothing was chosen by them."""
    data = SHARED_DATA / "scifact"
    found: dict[str, Any] = {}
    for kind in ("flat", "ivfpq", "ivfpqfs"):
        config = make_config(
            folder / kind,
            data,
            passages={"long": "truncate"},
            index={"kind": kind},
            store={"embeddings": f"{folder}/embeddings"},
        )
        started = time.perf_counter()
        outcome = reindex(config)
        opened = open_live(config)
        judged = str(data / "queries.jsonl.gz"), str(data / "qrels" / "test.tsv")
        metrics = labelled(opened.searcher, opened.spec, *judged, config.store)
        evaluation = outcome.live.evaluation
        found[kind] = {
            "exact": metrics["exact"],
            "index": metrics["index"],
            "recall@10": evaluation.recall,
            "nprobe": evaluation.point.nprobe,
            "rescore": evaluation.point.rescore,
            "nlist": outcome.live.index.nlist,
            "index_bytes": outcome.live.files["index.faiss"].size_bytes,
            "encoded": outcome.encoded,
            "reindex_s": round(time.perf_counter() - started, 1),
        }
        vectors = np.array(opened.partition.collection.vectors)
    return found, vectors


def noop(folder: Path) -> dict[str, Any]:
    """A second reindex of an unchanged corpus, Ray's start included."""
    file = folder / "noop.yaml"
    uri, root = SHARED_DATA / "scifact", folder / "flat"
    file.write_text(
        f"root: {root}\ncorpus: {{uri: {uri}}}\npassages: {{long: truncate}}\nindex: {{kind: flat}}\n"
        f"store: {{embeddings: {folder}/embeddings}}\n"
    )
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        command = [sys.executable, "-m", "jobs", "reindex", "-c", str(file), "--json", "-q"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HOME)
        times.append(time.perf_counter() - started)
        result = json.loads(done.stdout.splitlines()[-1])
        assert (result["encoded"], result["committed"]) == (0, False)
    return {"seconds": round(statistics.median(times), 1), "encoded": 0, "committed": False}


def training(vectors: Any) -> dict[str, Any]:
    """PQ training with and without the polysemous step that FAISS's factory adds by default, and the recall of both."""
    sample = vectors.astype(np.float32)
    plan = choose(IndexConfig(kind="ivfpq"), len(sample), sample.shape[1])

    def factory() -> Any:
        made = faiss.index_factory(sample.shape[1], f"IVF{plan.nlist},PQ{plan.m}x{plan.nbits}", faiss.METRIC_INNER_PRODUCT)
        made.train(sample)
        return made

    started = time.perf_counter()
    default = factory()
    default_s = time.perf_counter() - started
    started = time.perf_counter()
    ours = index.train(plan, sample, seed=1234)
    ours_s = time.perf_counter() - started
    own = np.arange(0, len(sample), 5)
    truth = operating.ground_truth(vectors, sample[own], own, 10)
    recalls = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, made in (("faiss default", default), ("vecmill", index.load_trained(ours))):
            made.add(sample)
            index.write(made, Path(folder) / name)
            opened = index_parts.Parts([(Path(folder) / name, 0, len(sample))], sample.shape[1])
            recalls[name] = {
                str(depth): round(
                    operating.measure(Collection(opened, vectors, vectors), truth, 1, nprobe=64, rescoring=depth)[
                        0
                    ].point.recall,
                    4,
                )
                for depth in (0, 10)
            }
    return {
        "vectors": len(sample),
        "nlist": plan.nlist,
        "m": plan.m,
        "faiss_default_s": round(default_s, 1),
        "vecmill_s": round(ours_s, 1),
        "ratio": round(default_s / ours_s, 1),
        "recall@10_at_nprobe_64_by_rescore": recalls,
    }


if __name__ == "__main__":
    main()
