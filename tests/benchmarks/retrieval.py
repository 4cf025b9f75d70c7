"""Measures dense, BM25, hybrid and re-ranked search on labelled sets; writes retrieval.json. Half an hour on 2 slow cores.

``python tests/benchmarks/retrieval.py FOLDER``: where training.py trained a cross-encoder and a model of late interaction on
SciFact's training queries; they re-rank the top 50 of dense search. SciFact and CACM are read from ../shared/data and indexed
by vecmill with its default settings and ``index.lexical``; what is judged is what ``search`` answers. Reciprocal rank fusion
has Cormack's 60 and equal weights, weighted fusion equal weights: nothing is tuned. Latencies are of one query at a time with
its encoding, medians over the queries.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HOME = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HOME))


from pipeline.client import Artifact, open_root
from pipeline.run import reindex
from pipeline.search.judgements import ir_metrics, read_qrels, read_queries
from pipeline.search.searcher import documents
from tests.benchmarks.machine import machine
from tests.conftest import SHARED_DATA, make_config

DATASETS = ("scifact", "cacm")
DEPTH = 100
WAYS: dict[str, dict[str, Any]] = {
    "dense": {"mode": "dense"},
    "BM25": {"mode": "lexical"},
    "hybrid, RRF": {"mode": "hybrid"},
    "hybrid, weighted": {"mode": "hybrid", "fusion": "weighted"},
}
RERANKERS = {"dense, cross-encoder": "reranker", "dense, late interaction": "late"}


def main() -> None:
    folder = Path(sys.argv[1]).absolute()
    found: dict[str, Any] = {"measured": machine()}
    for name in DATASETS:
        found[name] = dataset(folder, name)
        print(name, json.dumps(found[name], indent=1), flush=True)
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


def dataset(folder: Path, name: str) -> dict[str, Any]:
    data, store = SHARED_DATA / name, {"embeddings": str(folder / "embeddings")}
    config = make_config(folder / f"retrieval-{name}", data, index={"lexical": True}, store=store)
    live = reindex(config).live
    qrels = read_qrels(str(data / "qrels" / "test.tsv"), config.store)
    texts = {name: text for name, text in read_queries(str(data / "queries.jsonl.gz"), config.store).items() if name in qrels}
    rows = {}
    for way, how in (WAYS | {way: {"reranker": str(folder / "models" / model)} for way, model in RERANKERS.items()}).items():
        opened = open_root(config.model_copy(update={"search": config.search.model_copy(update=how)}))
        rows[way] = judge(opened, texts, qrels, rerank="reranker" in how)
        print(name, way, rows[way], flush=True)
    return {"documents": live.counts["documents"], "passages": live.counts["passages"], "queries": len(texts), "ways": rows}


def judge(opened: Artifact, texts: dict[str, str], qrels: Any, *, rerank: bool) -> dict[str, float]:
    ranked, seconds = {}, []
    opened.texts([next(iter(texts.values()))], DEPTH, rerank=rerank)  # loads a model
    for name, text in texts.items():
        started = time.perf_counter()
        (found,) = opened.texts([text], DEPTH, rerank=rerank)
        seconds.append(time.perf_counter() - started)
        ranked[name] = [hit.doc_id for hit in documents(found)][:DEPTH]
    metrics = ir_metrics(qrels, ranked)
    return {name: round(value, 4) for name, value in metrics.items()} | {"ms": round(1000 * statistics.median(seconds), 2)}


if __name__ == "__main__":
    main()
