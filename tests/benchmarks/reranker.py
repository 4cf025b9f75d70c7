"""Measures what a cross-encoder trained on few judgements makes of a dense ranking; writes reranker.json. A quarter of an hour.

``python tests/benchmarks/reranker.py FOLDER``: where the trained model is saved. It is all-MiniLM-L6-v2 with a new last layer,
trained on SciFact's train queries (../shared/data) against hard negatives from exact dense search, and measured on a fifth of
these queries that it was not trained on; the test queries are not read. Needs accelerate and datasets.
"""

import gzip
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HOME = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HOME))

import numpy as np

from pipeline.config import StoreConfig
from pipeline.encoder import Encoder, resolve_here
from pipeline.evaluation import ir_metrics, read_qrels, read_queries
from pipeline.model import find_model, resolve_spec
from pipeline.numerics import native_bf16
from pipeline.recall import exact_search
from pipeline.reranker import Reranker, load_reranker, rerank
from tests.benchmarks.spine import machine
from tests.conftest import MINILM, SHARED_DATA

SCIFACT = SHARED_DATA / "scifact"
SEED, HELD_OUT = 1234, 0.2
EPOCHS, LEARNING_RATE, WARM_UP = 2, 5e-5, 0.1
QUERIES_PER_STEP, MAX_TOKENS = 4, 192
NEGATIVES, NEGATIVES_FROM = 3, 20
"""Per positive, drawn from the best of dense search that are not judged relevant."""
DEPTHS = (10, 20, 50)


@dataclass(frozen=True)
class Judged:
    """Judged queries over a corpus, with what exact dense search finds for each."""

    texts: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    found: dict[str, list[str]]


def read_judged(folder: Path, split: str, depth: int) -> Judged:
    """A BEIR folder's queries of one split and their ``depth`` nearest documents by MiniLM."""
    with gzip.open(folder / "corpus.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    texts = {row["_id"]: f"{row.get('title', '')} {row['text']}".strip() for row in rows}
    qrels = read_qrels(str(folder / "qrels" / f"{split}.tsv"), StoreConfig())
    every = read_queries(str(folder / "queries.jsonl.gz"), StoreConfig())
    queries = {name: every[name] for name in qrels}
    encoder = Encoder(resolve_spec(model=MINILM, precision=resolve_here("auto"), backend="openvino")[0])
    vectors = encoder.encode_documents(list(texts.values())).astype(np.float16)
    nearest = exact_search(vectors, encoder.encode_queries(list(queries.values())), depth)[1]
    ids = list(texts)
    found = {name: [ids[row] for row in answers] for name, answers in zip(queries, nearest, strict=True)}
    return Judged(texts, queries, qrels, found)


def split_queries(names: Sequence[str], held_out: float, seed: int = SEED) -> tuple[list[str], list[str]]:
    """Query ids to train on and to measure on, the same in every run."""
    order = np.random.default_rng(seed).permutation(len(names))
    border = round(len(names) * held_out)
    return [names[row] for row in np.sort(order[border:])], [names[row] for row in np.sort(order[:border])]


def train_cross_encoder(
    out: Path, judged: Judged, names: Sequence[str], *, epochs: int = EPOCHS, seed: int = SEED
) -> dict[str, float]:
    """Train a cross-encoder on the judgements of the queries in ``names`` and save it in ``out``. Returns what it took."""
    import torch
    from datasets import Dataset
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import ListNetLoss

    torch.manual_seed(seed)
    path = str(find_model(MINILM).path)
    model = CrossEncoder(path, num_labels=1, max_length=MAX_TOKENS, device="cpu", activation_fn=torch.nn.Identity())
    rows = training_lists(judged, names, seed)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = CrossEncoderTrainingArguments(
            output_dir=scratch,
            num_train_epochs=epochs,
            per_device_train_batch_size=QUERIES_PER_STEP,
            learning_rate=LEARNING_RATE,
            warmup_steps=WARM_UP,
            seed=seed,
            data_seed=seed,
            use_cpu=True,
            bf16=native_bf16(),
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = CrossEncoderTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_list(rows), loss=ListNetLoss(model)
        )
        loss = trainer.train().training_loss
    model.save(str(out))
    seconds = time.perf_counter() - started
    return {"queries": len(names), "lists": len(rows), "epochs": epochs, "loss": round(loss, 4), "seconds": round(seconds)}


def training_lists(judged: Judged, names: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """For each relevant document of each query: it and hard negatives, with labels."""
    rng = np.random.default_rng(seed)
    rows = []
    for name in names:
        relevant = [doc for doc, grade in judged.qrels[name].items() if grade > 0]
        others = [doc for doc in judged.found[name] if doc not in judged.qrels[name]][:NEGATIVES_FROM]
        for doc in relevant:
            documents = [doc, *rng.choice(others, NEGATIVES, replace=False)]
            row = {"query": judged.queries[name], "documents": [judged.texts[other] for other in documents]}
            rows.append(row | {"labels": [1.0] + [0.0] * NEGATIVES})
    return rows


def measure(reranker: Reranker, judged: Judged, names: Sequence[str], depths: Sequence[int] = DEPTHS) -> dict[str, Any]:
    """nDCG@10 of dense search alone and with its best texts re-ranked, to each depth; milliseconds per query at the last."""
    qrels = {name: judged.qrels[name] for name in names}
    dense = {name: judged.found[name] for name in names}
    scores, times_ms = {}, []
    for name in names:
        started = time.perf_counter()
        scores[name] = reranker.score(judged.queries[name], [judged.texts[doc] for doc in dense[name][: max(depths)]])
        times_ms.append((time.perf_counter() - started) * 1000)
    found = {"dense": ndcg(qrels, dense)}
    for depth in depths:
        ranked = {name: [dense[name][row] for row in rerank(scores[name][:depth])] + dense[name][depth:] for name in names}
        found[f"re-ranked, depth {depth}"] = ndcg(qrels, ranked)
    return {
        "queries": len(names),
        "ndcg@10": found,
        "precision": reranker.precision,
        "p50_ms": round(float(np.median(times_ms)), 1),
        "texts": max(depths),
    }


def ndcg(qrels: Mapping[str, Mapping[str, int]], ranked: Mapping[str, Sequence[str]]) -> float:
    return round(ir_metrics(qrels, ranked)["ndcg@10"], 4)


def main() -> None:
    out = Path(sys.argv[1])
    started = time.perf_counter()
    judged = read_judged(SCIFACT, "train", max(DEPTHS))
    train, dev = split_queries(list(judged.queries), HELD_OUT)
    training = train_cross_encoder(out, judged, train)
    print(json.dumps(training), flush=True)
    found = {"measured": machine(), "training": training, "dev": measure(load_reranker(str(out)), judged, dev)}
    found["wall_s"] = round(time.perf_counter() - started)
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
