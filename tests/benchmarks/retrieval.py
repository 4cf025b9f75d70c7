"""Measures dense, BM25, hybrid and re-ranked search on labelled sets; writes retrieval.json. Half an hour on 2 cores.

``python tests/benchmarks/retrieval.py FOLDER``: FOLDER keeps a re-ranker trained on SciFact's training queries. SciFact
and CACM are read from ../shared/data and indexed by vecmill with its default settings and ``index.lexical``; what is judged is
what ``search`` answers. Reciprocal rank fusion has Cormack's 60 and equal weights, so nothing is tuned; the re-ranker has seen
SciFact's training queries and nothing of CACM. Latencies are of one query at a time with encoding, medians over the queries.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HOME = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HOME))

from tests.benchmarks.reranker import train_cross_encoder

from pipeline.client import Artifact, open_root
from pipeline.evaluation import ir_metrics, read_qrels, read_queries
from pipeline.run import reindex
from pipeline.searcher import documents
from tests.benchmarks.spine import machine
from tests.conftest import SHARED_DATA, make_config

DATASETS = ("scifact", "cacm")
DEPTH, TIMED = 100, 100
WAYS: dict[str, dict[str, Any]] = {
    "dense": {"mode": "dense"},
    "BM25": {"mode": "lexical"},
    "hybrid (RRF)": {"mode": "hybrid"},
    "hybrid (weighted)": {"mode": "hybrid", "fusion": "weighted"},
    "dense, re-ranked": {"mode": "dense", "rerank": True},
    "hybrid (RRF), re-ranked": {"mode": "hybrid", "rerank": True},
}


def main() -> None:
    model = Path(sys.argv[1]) / "reranker"
    if not model.exists():
        train_cross_encoder(model)
    found: dict[str, Any] = {"measured": machine()}
    with tempfile.TemporaryDirectory() as scratch:
        for name in DATASETS:
            found[name] = dataset(Path(scratch) / name, SHARED_DATA / name, str(model))
            print(name, json.dumps(found[name], indent=1), flush=True)
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


def dataset(root: Path, data: Path, reranker: str) -> dict[str, Any]:
    config = make_config(root, data, index={"lexical": True}, search={"reranker": reranker})
    live = reindex(config).live
    opened = open_root(config)
    qrels = read_qrels(str(data / "qrels" / "test.tsv"), config.store)
    texts = {name: text for name, text in read_queries(str(data / "queries.jsonl.gz"), config.store).items() if name in qrels}
    rows = {way: judge(opened, texts, qrels, how) for way, how in WAYS.items()}
    return {"documents": live.counts["documents"], "passages": live.counts["passages"], "queries": len(texts), "ways": rows}


def judge(opened: Artifact, texts: dict[str, str], qrels: Any, how: dict[str, Any]) -> dict[str, float]:
    ranked, seconds = {}, []
    opened.texts([next(iter(texts.values()))], DEPTH, **how)  # loads a model
    for name, text in texts.items():
        started = time.perf_counter()
        (found,) = opened.texts([text], DEPTH, **how)
        seconds.append(time.perf_counter() - started)
        ranked[name] = [hit.doc_id for hit in documents(found)][:DEPTH]
    metrics = ir_metrics(qrels, ranked)
    return {name: round(value, 4) for name, value in metrics.items()} | {"ms": round(1000 * statistics.median(seconds), 2)}


if __name__ == "__main__":
    main()
