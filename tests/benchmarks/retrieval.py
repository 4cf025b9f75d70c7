"""Measures dense, BM25, hybrid and re-ranked search on labelled sets; writes retrieval.json. Five minutes on 2 cores.

``python tests/benchmarks/retrieval.py [RERANKER]``: a folder with a cross-encoder, for the re-ranked rows; training.py trains
one. SciFact and CACM are read from ../shared/data and indexed by vecmill with its default settings and ``index.lexical``; what
is judged is what ``search`` answers. Reciprocal rank fusion has Cormack's 60 and equal weights, weighted fusion equal weights:
nothing is tuned. Latencies are of one query at a time with its encoding, medians over the queries.
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


from pipeline.client import Artifact, open_root
from pipeline.evaluation import ir_metrics, read_qrels, read_queries
from pipeline.run import reindex
from pipeline.searcher import documents
from tests.benchmarks.spine import machine
from tests.conftest import SHARED_DATA, make_config

DATASETS = ("scifact", "cacm")
DEPTH = 100
WAYS: dict[str, dict[str, Any]] = {
    "dense": {"mode": "dense"},
    "BM25": {"mode": "lexical"},
    "hybrid, RRF": {"mode": "hybrid"},
    "hybrid, weighted": {"mode": "hybrid", "fusion": "weighted"},
}
RERANKED = {f"{name}, re-ranked": WAYS[name] | {"rerank": True} for name in ("dense", "hybrid, RRF")}


def main() -> None:
    reranker = sys.argv[1] if len(sys.argv) > 1 else None
    found: dict[str, Any] = {"measured": machine()}
    with tempfile.TemporaryDirectory() as scratch:
        for name in DATASETS:
            found[name] = dataset(Path(scratch) / name, SHARED_DATA / name, reranker)
            print(name, json.dumps(found[name], indent=1), flush=True)
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


def dataset(root: Path, data: Path, reranker: str | None) -> dict[str, Any]:
    config = make_config(root, data, index={"lexical": True}, search={"reranker": reranker})
    live = reindex(config).live
    qrels = read_qrels(str(data / "qrels" / "test.tsv"), config.store)
    texts = {name: text for name, text in read_queries(str(data / "queries.jsonl.gz"), config.store).items() if name in qrels}
    rows = {}
    for way, how in (WAYS | (RERANKED if reranker else {})).items():
        search = config.search.model_copy(update={name: how[name] for name in ("mode", "fusion") if name in how})
        opened = open_root(config.model_copy(update={"search": search}))
        rows[way] = judge(opened, texts, qrels, rerank=how.get("rerank", False))
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
