"""Measures what codes of 1/8 to 2 bytes per dimension cost in retrieval quality; writes quality.json. Ten minutes on 2 cores.

SciFact, CACM and XQuAD are read from ../shared/data, encoded in FP32 by all-MiniLM-L6-v2. Each index is searched with the
settings that ``operating`` chooses on held-out passages for each target recall, never on the judged queries, with its
candidates re-scored from float16, from int8, and not at all. nDCG@10 of exact float32 search is what they are held against.
"""

import gzip
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HOME = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HOME))

import numpy as np

from pipeline import index, operating
from pipeline.collection import Collection
from pipeline.config import StoreConfig
from pipeline.config_what import IndexConfig
from pipeline.encoder import Encoder
from pipeline.evaluation import ir_metrics, read_qrels, read_queries
from pipeline.index_parts import Parts
from pipeline.index_plan import choose
from pipeline.model import resolve_spec
from pipeline.recall import exact_search
from pipeline.vectors import Int8Vectors, write_int8
from tests.benchmarks.spine import machine
from tests.conftest import MINILM, SHARED_DATA

DATASETS = ("scifact", "cacm", "xquad")
KINDS: dict[str, tuple[float, dict[str, Any]]] = {
    "ivfpqfs, 4 bits for 4 dimensions": (1 / 8, {"kind": "ivfpqfs", "m": 96}),
    "ivfrabitq": (1 / 8, {"kind": "ivfrabitq"}),
    "ivfpq, 8 bits for 8 dimensions": (1 / 8, {"kind": "ivfpq", "m": 48}),
    "ivfpqfs, 4 bits for 2 dimensions": (1 / 4, {"kind": "ivfpqfs", "m": 192}),
    "ivfpq, 8 bits for 4 dimensions": (1 / 4, {"kind": "ivfpq", "m": 96}),
    "ivfpq, 8 bits for 2 dimensions": (1 / 2, {"kind": "ivfpq", "m": 192}),
    "ivfsq8": (1, {"kind": "ivfsq8"}),
}
TARGETS = (0.95, 0.97, 0.99)
HELD_OUT, K, SEED = 500, 10, 1234


def main() -> None:
    spec, _ = resolve_spec(model=MINILM, precision="fp32", backend="openvino")
    encoder = Encoder(spec)
    found: dict[str, Any] = {"measured": machine()}
    for name in DATASETS:
        found[name] = dataset(SHARED_DATA / name, encoder)
        print(name, json.dumps(found[name], indent=1), flush=True)
    found["ratios"] = {
        kind: {
            how: {"least": min(values), "mean": round(sum(values) / len(values), 4)}
            for how in found[DATASETS[0]]["kinds"][kind]
            if (values := [ratio(found[name], kind, how) for name in DATASETS])
        }
        for kind in KINDS
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["ratios"], indent=1))


def ratio(measured: Mapping[str, Any], kind: str, how: str) -> float:
    return round(measured["kinds"][kind][how]["ndcg@10"] / measured["exact float32"], 4)


def dataset(folder: Path, encoder: Encoder) -> dict[str, Any]:
    with gzip.open(folder / "corpus.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    ids = [row["_id"] for row in rows]
    exact = encoder.encode_documents([f"{row.get('title', '')} {row['text']}".strip() for row in rows])
    qrels = read_qrels(str(folder / "qrels" / "test.tsv"), StoreConfig())
    texts = {
        name: text for name, text in read_queries(str(folder / "queries.jsonl.gz"), StoreConfig()).items() if name in qrels
    }
    queries = encoder.encode_queries(list(texts.values()))
    names = list(texts)

    def ndcg(found: Any) -> float:
        ranked = {name: [ids[row] for row in answers if row >= 0] for name, answers in zip(names, found, strict=True)}
        return round(ir_metrics(qrels, ranked)["ndcg@10"], 4)

    full = np.argsort(-(queries @ exact.T), axis=1, kind="stable")[:, :K]
    stored = exact.astype(np.float16)
    halves = exact_search(stored, queries, K)[1]
    measured = {"documents": len(ids), "queries": len(names), "exact float32": ndcg(full), "exact float16": ndcg(halves)}
    with tempfile.TemporaryDirectory() as scratch:
        write_int8(stored, Path(scratch) / "int8")
        rescorers = {"float16": stored, "int8": Int8Vectors(Path(scratch) / "int8", exact.shape[1]), "none": None}
        measured["kinds"] = {
            kind: by_kind(settings, exact, rescorers, queries, ndcg, Path(scratch)) for kind, (_, settings) in KINDS.items()
        }
    return measured


def by_kind(settings: Any, exact: Any, rescorers: Any, queries: Any, ndcg: Any, folder: Path) -> dict[str, Any]:
    rng = np.random.default_rng(SEED)
    order = rng.permutation(len(exact))
    own, others = np.sort(order[:HELD_OUT]), order[HELD_OUT:]
    plan = choose(IndexConfig(**settings), len(exact), exact.shape[1])
    data = index.train(replace(plan, train_vectors=len(others)), exact[others], SEED)
    codes = index.Trained(data).encode(exact, "vectors")
    made = index.merge(data, plan.kind, [(codes, np.arange(len(codes)))])
    index.write(made, folder / "index")
    opened = Parts([(folder / "index", 0, len(exact))], exact.shape[1], mapped=index.can_be_mapped(made))
    stored = rescorers["float16"]
    truth = operating.ground_truth(stored, stored[own].astype(np.float32), own, K)
    rows: dict[str, Any] = {}
    for name, rescorer in rescorers.items():
        collection = Collection(opened, stored, rescorer)
        measured = operating.measure(collection, truth, max(TARGETS))
        for target in TARGETS:
            point = operating.choose(measured, target, None).point
            found = collection.search(queries, K, nprobe=point.nprobe, rescoring=point.rescore)[1]
            row = {
                "ndcg@10": ndcg(found),
                "recall@10": round(point.recall, 4),
                "nprobe": point.nprobe,
                "rescore": point.rescore,
            }
            rows[f"{name}, target {target}"] = row
    return rows


if __name__ == "__main__":
    main()
