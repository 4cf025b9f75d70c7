"""Measures what re-rankers and encoders learn from a quarter, half and all of few judgements; writes curve.json.

``python tests/benchmarks/curve.py pack FOLDER PACK``: puts what the trainings take into PACK; FOLDER: that of training.py.
``python tests/benchmarks/curve.py run PACK OUT [PROCESSES]``: trains and judges; minutes on a GPU, an evening without. It
needs neither Ray nor FAISS: PACK and this checkout are all that a GPU box takes. OUT/curve.json is what is committed;
run again, it goes on where it was cut short.

SciFact's 809 training queries, MiniLM as shipped, negatives mined by it. The cross-encoder's epochs and learning rate are
chosen on a fifth of the training queries after training on the others; the 300 test queries judge what was chosen, and the
recipe of the command beside it. Late interaction and encoders have their command's recipe. Re-rankers order the top 50 of
dense search; texts of 512 tokens. Each size is a draw of queries, another for each seed.
"""

import gzip
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HOME = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HOME))

import numpy as np

from pipeline.config import Config
from pipeline.fingerprint import fingerprint
from pipeline.judgements import ir_metrics, read_qrels, read_queries
from pipeline.training.pairs import Pair, read_pairs
from pipeline.training.recipe import Kind, Recipe, plan_training
from tests.benchmarks.machine import machine

DEPTH, TOKENS, DRAWN = 50, 512, 5
SEEDS = (1, 2, 3)
SHARES = (0.25, 0.5, 1.0)
RERANKER = Recipe(epochs=2, batch=4, learning_rate=5e-5, negatives=4, max_tokens=TOKENS)
LATE = Recipe(epochs=2, batch=32, learning_rate=5e-5, negatives=1)
MINED = Recipe(epochs=2, batch=32, learning_rate=5e-5, negatives=4)
IN_BATCH = replace(MINED, negatives=0)
CHOICES = [replace(RERANKER, epochs=epochs, learning_rate=rate) for epochs in (2, 4, 8) for rate in (2e-5, 5e-5, 1e-4)]

Judgements = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Task:
    """A training and the queries that judge it. ``share``: of the training queries, drawn with the recipe's seed."""

    kind: Kind
    recipe: Recipe
    judged: str = "test"
    share: float = 1.0


def pack(folder: Path, out: Path) -> None:
    """Model in 16 bits, pairs, texts, judgements, and the top 50 of dense search for every judged query."""
    from safetensors.numpy import load_file, save_file

    from pipeline.client import open_root
    from pipeline.config_file import load_config
    from pipeline.model import find_model
    from pipeline.searcher import documents
    from tests.conftest import MINILM, SHARED_DATA

    data = SHARED_DATA / "scifact"
    settings = load_config(str(folder / "shipped-scifact.yaml"))
    out.mkdir(parents=True)
    shutil.copytree(find_model(MINILM, None).path, out / "model", ignore=shutil.ignore_patterns("*.onnx", "openvino*"))
    weights = out / "model" / "model.safetensors"
    half = {name: array.astype("float16") if array.dtype.kind == "f" else array for name, array in load_file(weights).items()}
    save_file(half, weights, metadata={"format": "pt"})
    shutil.copy(folder / "train.parquet", out / "train.parquet")
    for name in ("queries.jsonl.gz", "qrels/test.tsv", "qrels/train.tsv"):
        shutil.copy(data / name, out / Path(name).name)
    qrels = _qrels(out, "test") | _qrels(out, "train")
    queries = read_queries(str(out / "queries.jsonl.gz"), settings.store)
    found = open_root(settings).texts([queries[name] for name in qrels], DEPTH)
    ranked = {name: [hit.doc_id for hit in documents(each)][:DEPTH] for name, each in zip(qrels, found, strict=True)}
    (out / "dense.json.gz").write_bytes(gzip.compress(json.dumps(ranked).encode()))
    rows = [json.loads(line) for line in gzip.decompress((data / "corpus.jsonl.gz").read_bytes()).splitlines()]
    texts = {row["_id"]: f"{row['title']} {row['text']}" for row in rows}
    (out / "texts.json.gz").write_bytes(gzip.compress(json.dumps(texts).encode()))


def run(packed: Path, out: Path, processes: int) -> None:
    """Choose on the fifth, then every size and seed on the test queries."""
    started = time.perf_counter()
    found: dict[str, Any] = {"measured": machine(), "dense": _metrics(_dense(packed), _qrels(packed, "test"))}
    kept = out / "done.jsonl"
    known = dict(json.loads(line) for line in kept.read_text().splitlines()) if kept.is_file() else {}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool, kept.open("a") as log:

        def done(tasks: Sequence[Task]) -> list[dict[str, Any]]:
            names = {fingerprint(asdict(task)): task for task in tasks}
            running = {pool.submit(_one, packed, out, task): name for name, task in names.items() if name not in known}
            for each in as_completed(running):
                known[running[each]] = each.result()
                log.write(json.dumps([running[each], each.result()]) + "\n")
                log.flush()
            return [asdict(task) | known[name] for name, task in names.items()]

        found["dev"] = done([Task("reranker", recipe, judged="dev") for recipe in CHOICES])
        best = CHOICES[int(np.argmax([row["ndcg@10"] for row in found["dev"]]))]
        found["chosen"] = asdict(best)
        sizes = [(share, seed) for share in SHARES for seed in SEEDS]
        tasks = [Task("reranker", replace(best, seed=seed), share=share) for share, seed in sizes]
        tasks += [Task("reranker", replace(RERANKER, seed=seed)) for seed in SEEDS]
        tasks += [Task("late", replace(LATE, seed=seed), share=share) for share, seed in sizes]
        tasks += [Task("encoder", replace(MINED, seed=seed), share=share) for share, seed in sizes]
        tasks += [Task("encoder", replace(IN_BATCH, seed=seed)) for seed in SEEDS]
        found["test"] = done(tasks)
    found["means"] = means(found["test"])
    found["wall_s"] = round(time.perf_counter() - started, 1)
    (out / "curve.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({name: found[name] for name in ("measured", "dense", "chosen", "means", "wall_s")}, indent=1))


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the seeds, with their standard deviation and the extremes."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        recipe = {name: value for name, value in row["recipe"].items() if name != "seed"}
        groups.setdefault(json.dumps([row["kind"], row["share"], recipe]), []).append(row)
    told = []
    for group in groups.values():
        quality = [row["ndcg@10"] for row in group]
        told.append(
            {
                "kind": group[0]["kind"],
                "share": group[0]["share"],
                **{name: group[0]["recipe"][name] for name in ("epochs", "learning_rate", "negatives")},
                "pairs": round(statistics.mean(row["pairs"] for row in group)),
                "seeds": len(group),
                "ndcg@10": round(statistics.mean(quality), 4),
                "sd": round(statistics.stdev(quality), 4),
                "least": min(quality),
                "most": max(quality),
                "train_s": round(statistics.median(row["train_s"] for row in group), 1),
            }
        )
    return told


def _one(packed: Path, out: Path, task: Task) -> dict[str, Any]:
    """Train a task's model and judge it."""
    from pipeline.training.trainer import train

    pairs = _pairs(packed, task)
    config = _config(packed)
    name = f"{task.kind}-{task.judged}-{task.share}-" + "-".join(
        str(value) for value in asdict(task.recipe).values() if value != ()
    )
    training = plan_training(task.kind, config, pairs, task.recipe, out / "models" / name)
    trained = train(training)
    judge = _exact if task.kind == "encoder" else _reranked
    started = time.perf_counter()
    ranked = judge(packed, training.out, _judged(packed, task.judged))
    seconds = {"train_s": round(trained.seconds, 1), "judge_s": round(time.perf_counter() - started, 1)}
    shutil.rmtree(training.out)
    found = {"pairs": len(pairs), "steps": trained.steps, "losses": [trained.losses[0][1], trained.losses[-1][1]], **seconds}
    return found | _metrics(ranked, _judged(packed, task.judged))


def _reranked(packed: Path, model: Path, judged: Judgements) -> dict[str, list[str]]:
    from pipeline.reranker import load_reranker, rerank

    reranker, texts, queries = load_reranker(str(model), max_tokens=TOKENS), _texts(packed), _queries(packed)
    ranked = {}
    for name, ids in _dense(packed).items():
        if name in judged:
            order = rerank(reranker.score(queries[name], [texts[each] for each in ids]))
            ranked[name] = [ids[row] for row in order]
    return ranked


def _exact(packed: Path, model: Path, judged: Judgements) -> dict[str, list[str]]:
    """The top 50 of exact search with a trained encoder."""
    from pipeline.encoder import Encoder
    from pipeline.model import resolve_spec
    from pipeline.numerics import on_gpu

    spec = resolve_spec(model=str(model), precision="fp16" if on_gpu() else "fp32")[0]
    encoder, texts, queries = Encoder(spec), _texts(packed), _queries(packed)
    ids = np.array(list(texts))
    vectors = encoder.encode_documents(list(texts.values()))
    scores = encoder.encode_queries([queries[name] for name in judged]) @ vectors.T
    return {name: ids[np.argsort(-row)[:DEPTH]].tolist() for name, row in zip(judged, scores, strict=True)}


def _pairs(packed: Path, task: Task) -> list[Pair]:
    """Those of a share of the training queries; without the fifth that judges where that is what judges."""
    pairs = read_pairs(str(packed / "train.parquet"), _config(packed))
    held = _fifth(packed) if task.judged == "dev" else set()
    names = sorted({str(pair.query_id) for pair in pairs} - held)
    drawn = np.random.default_rng(task.recipe.seed).permutation(len(names))[: round(task.share * len(names))]
    kept = {names[number] for number in drawn}
    return [pair for pair in pairs if str(pair.query_id) in kept]


def _judged(packed: Path, name: str) -> Judgements:
    if name == "test":
        return _qrels(packed, "test")
    held = _fifth(packed)
    return {query: judgements for query, judgements in _qrels(packed, "train").items() if query in held}


def _fifth(packed: Path) -> set[str]:
    names = sorted(_qrels(packed, "train"))
    drawn = np.random.default_rng(0).permutation(len(names))[: len(names) // DRAWN]
    return {names[number] for number in drawn}


def _metrics(ranked: Mapping[str, Sequence[str]], judged: Judgements) -> dict[str, float]:
    return {name: round(value, 4) for name, value in ir_metrics(judged, ranked).items()}


def _config(packed: Path) -> Config:
    return Config.model_validate(
        {"root": str(packed / "root"), "corpus": {"uri": str(packed / "corpus")}, "encoder": {"model": str(packed / "model")}}
    )


@cache
def _qrels(packed: Path, name: str) -> dict[str, dict[str, int]]:
    return read_qrels(str(packed / f"{name}.tsv"), _config(packed).store)


@cache
def _queries(packed: Path) -> dict[str, str]:
    return read_queries(str(packed / "queries.jsonl.gz"), _config(packed).store)


@cache
def _texts(packed: Path) -> dict[str, str]:
    return dict(json.loads(gzip.decompress((packed / "texts.json.gz").read_bytes())))


@cache
def _dense(packed: Path) -> dict[str, list[str]]:
    return dict(json.loads(gzip.decompress((packed / "dense.json.gz").read_bytes())))


if __name__ == "__main__":
    first, second = (Path(each).absolute() for each in sys.argv[2:4])
    if sys.argv[1] == "pack":
        pack(first, second)
    else:
        second.mkdir(parents=True, exist_ok=True)
        run(first, second, int(sys.argv[4]) if len(sys.argv) > 4 else 1)
