"""Measures what a cross-encoder learns from a quarter, half and all of few judgements; writes curve.json.

``python tests/benchmarks/curve.py pack FOLDER PACK``: puts what the trainings take into PACK; FOLDER: that of training.py.
``python tests/benchmarks/curve.py run PACK OUT [PROCESSES]``: trains and judges; minutes on a GPU, an evening without. It
needs neither Ray nor FAISS: PACK and this checkout are all that a GPU box takes. OUT/curve.json is what is committed;
run again, it goes on where it was cut short.

SciFact's 809 training queries, MiniLM as shipped, negatives mined by it, pairs of 512 tokens. The learning rate is chosen on
a fifth of the training queries after training on the others; SciFact's 300 test queries judge what was chosen, and CACM,
which nothing was trained on: their top 50 of dense search in the order of the model. ``train_s`` is of ``processes`` that
share the device. Each size is a draw of queries, another for each seed.
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
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HOME = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HOME))

import numpy as np

from pipeline.config import Config, StoreConfig
from pipeline.fingerprint import fingerprint
from pipeline.search.judgements import ir_metrics, read_qrels, read_queries
from pipeline.training.pairs import Pair, read_pairs
from pipeline.training.recipe import Recipe, plan_training
from tests.benchmarks.machine import machine

DEPTH, TOKENS, DRAWN = 50, 512, 5
SEEDS = (1, 2)
SHARES = (0.25, 0.5, 1.0)
RERANKER = Recipe(epochs=2, batch=4, learning_rate=5e-5, negatives=4, max_tokens=TOKENS)
CHOICES = [replace(RERANKER, learning_rate=rate) for rate in (2e-5, 5e-5, 1e-4)]
SETS = ("scifact", "cacm")


@dataclass(frozen=True)
class Task:
    """A training and the queries that judge it. ``share``: of the training queries, drawn with the recipe's seed."""

    recipe: Recipe
    judged: str = "test"
    share: float = 1.0


def pack(folder: Path, out: Path) -> None:
    """Model in 16 bits, pairs, texts, judgements, and the top 50 of dense search for every judged query."""
    from safetensors.numpy import load_file, save_file

    from pipeline.config_file import load_config
    from pipeline.encoding.model import find_model
    from tests.conftest import MINILM, SHARED_DATA

    out.mkdir(parents=True)
    shutil.copytree(find_model(MINILM, None).path, out / "model", ignore=shutil.ignore_patterns("*.onnx", "openvino*"))
    weights = out / "model" / "model.safetensors"
    half = {name: array.astype("float16") if array.dtype.kind == "f" else array for name, array in load_file(weights).items()}
    save_file(half, weights, metadata={"format": "pt"})
    shutil.copy(folder / "train.parquet", out / "train.parquet")
    for name in SETS:
        _pack_set(out / name, SHARED_DATA / name, load_config(str(folder / f"shipped-{name}.yaml")))


def _pack_set(out: Path, data: Path, settings: Config) -> None:
    from pipeline.client import open_root
    from pipeline.search.searcher import documents

    out.mkdir()
    for file in (data / "queries.jsonl.gz", *(data / "qrels").glob("*.tsv")):
        shutil.copy(file, out / file.name)
    names = [name for file in sorted(out.glob("*.tsv")) for name in read_qrels(str(file), settings.store)]
    queries = read_queries(str(out / "queries.jsonl.gz"), settings.store)
    found = open_root(settings).texts([queries[name] for name in names], DEPTH)
    ranked = {name: [hit.doc_id for hit in documents(each)][:DEPTH] for name, each in zip(names, found, strict=True)}
    (out / "dense.json.gz").write_bytes(gzip.compress(json.dumps(ranked).encode()))
    rows = [json.loads(line) for line in gzip.decompress((data / "corpus.jsonl.gz").read_bytes()).splitlines()]
    texts = {row["_id"]: f"{row['title']} {row['text']}".strip() for row in rows}
    (out / "texts.json.gz").write_bytes(gzip.compress(json.dumps(texts).encode()))


def run(packed: Path, out: Path, processes: int) -> None:
    """Choose on the fifth, then every size and seed on the test queries."""
    found: dict[str, Any] = {"measured": machine()}
    found["dense"] = {name: _metrics(_dense(packed, name), _judged(packed, name)) for name in ("dev", *SETS)}
    kept = out / "done.jsonl"
    known = dict(json.loads(line) for line in kept.read_text().splitlines()) if kept.is_file() else {}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool, kept.open("a") as log:

        def done(tasks: Sequence[Task]) -> list[dict[str, Any]]:
            names = {fingerprint(asdict(task)): task for task in tasks}
            running = {pool.submit(_one, packed, out, task): name for name, task in names.items() if name not in known}
            for each in as_completed(running):
                known[running[each]] = each.result() | {"processes": processes}
                log.write(json.dumps([running[each], known[running[each]]]) + "\n")
                log.flush()
            return [asdict(task) | known[name] for name, task in names.items()]

        found["dev"] = done([Task(recipe, judged="dev") for recipe in CHOICES])
        best = CHOICES[int(np.argmax([row["dev"]["ndcg@10"] for row in found["dev"]]))]
        found["chosen"] = asdict(best)
        tasks = [Task(replace(best, seed=seed), share=share) for share in SHARES[::-1] for seed in SEEDS]
        found["test"] = done(tasks)
    found["means"] = means(found["test"])
    (out / "curve.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({name: found[name] for name in ("measured", "dense", "chosen", "means")}, indent=1))


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the seeds, with the extremes."""
    groups: dict[tuple[float, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["recipe"]["learning_rate"], row["share"]), []).append(row)
    return [
        {
            "learning_rate": rate,
            "share": share,
            "seeds": len(group),
            "pairs": round(statistics.mean(row["pairs"] for row in group)),
        }
        | {name: _spread([row[name]["ndcg@10"] for row in group]) for name in SETS}
        | {"train_s": round(statistics.median(row["train_s"] for row in group), 1)}
        for (rate, share), group in groups.items()
    ]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": round(statistics.mean(values), 4), "least": min(values), "most": max(values)}


def _one(packed: Path, out: Path, task: Task) -> dict[str, Any]:
    """Train a task's model and judge it."""
    from pipeline.search.reranker import load_reranker
    from pipeline.training.trainer import train

    pairs = _pairs(packed, task)
    training = plan_training("reranker", _config(packed), pairs, task.recipe, out / "models" / fingerprint(asdict(task)))
    trained = train(training)
    started = time.perf_counter()
    reranker = load_reranker(str(training.out), max_tokens=TOKENS)
    judged = {name: _judge(packed, name, reranker) for name in (("dev",) if task.judged == "dev" else SETS)}
    seconds = {"train_s": round(trained.seconds, 1), "judge_s": round(time.perf_counter() - started, 1)}
    found = {"pairs": len(pairs), "steps": trained.steps, "losses": [trained.losses[0][1], trained.losses[-1][1]], **seconds}
    return found | judged


def _judge(packed: Path, name: str, reranker: Any) -> dict[str, float]:
    from pipeline.search.reranker import rerank

    texts = _read(packed / _set(name) / "texts.json.gz")
    queries = read_queries(str(packed / _set(name) / "queries.jsonl.gz"), StoreConfig())
    judged, ranked = _judged(packed, name), {}
    for query, ids in _dense(packed, name).items():
        if query in judged:
            order = rerank(reranker.score(queries[query], [texts[each] for each in ids]))
            ranked[query] = [ids[row] for row in order]
    return _metrics(ranked, judged)


def _pairs(packed: Path, task: Task) -> list[Pair]:
    """Those of a share of the training queries; without the fifth that judges where that is what judges."""
    pairs = read_pairs(str(packed / "train.parquet"), _config(packed))
    held = set(_judged(packed, "dev")) if task.judged == "dev" else set()
    names = sorted({str(pair.query_id) for pair in pairs} - held)
    drawn = np.random.default_rng(task.recipe.seed).permutation(len(names))[: round(task.share * len(names))]
    kept = {names[number] for number in drawn}
    return [pair for pair in pairs if str(pair.query_id) in kept]


def _config(packed: Path) -> Config:
    settings = {"root": str(packed / "root"), "corpus": {"uri": str(packed / "corpus")}}
    return Config.model_validate(settings | {"encoder": {"model": str(packed / "model")}})


def _judged(packed: Path, name: str) -> Mapping[str, Mapping[str, int]]:
    """Judgements of a set's test queries, or those of the fifth of SciFact's training queries, ``dev``."""
    folder = packed / _set(name)
    if name != "dev":
        return read_qrels(str(folder / "test.tsv"), StoreConfig())
    qrels = read_qrels(str(folder / "train.tsv"), StoreConfig())
    names = sorted(qrels)
    drawn = np.random.default_rng(0).permutation(len(names))[: len(names) // DRAWN]
    return {names[number]: qrels[names[number]] for number in sorted(drawn)}


def _set(name: str) -> str:
    return "scifact" if name == "dev" else name


def _dense(packed: Path, name: str) -> dict[str, list[str]]:
    return dict(_read(packed / _set(name) / "dense.json.gz"))


def _read(file: Path) -> Any:
    return json.loads(gzip.decompress(file.read_bytes()))


def _metrics(ranked: Mapping[str, Sequence[str]], judged: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in ir_metrics(judged, ranked).items() if name != "recall@100"}


if __name__ == "__main__":
    first, second = (Path(each).absolute() for each in sys.argv[2:4])
    if sys.argv[1] == "pack":
        pack(first, second)
    else:
        second.mkdir(parents=True, exist_ok=True)
        run(first, second, int(sys.argv[4]) if len(sys.argv) > 4 else 1)
