"""Measures what training on few judgements does to retrieval; writes training.json. An hour and a half on 2 cores.

``python tests/benchmarks/training.py FOLDER``: where everything is kept; run again, it goes on where it was cut short.
SciFact (../shared/data): every choice is made on a fifth of its 809 training queries, by exact search; then all 809 train the
models that its 300 test queries judge, which nothing else reads. CACM is judged too and never trained on. The loop is the
commands of the README, each timed; quality is that of the live artifacts, as ``vecmill compare`` tells it.
"""

import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HOME = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HOME))

import numpy as np

from pipeline.comparison import compare
from pipeline.config import StoreConfig
from pipeline.config_file import load_config
from pipeline.encoder import Encoder, resolve_here
from pipeline.evaluation import ir_metrics, read_qrels, read_queries
from pipeline.model import resolve_spec
from pipeline.recall import exact_search
from pipeline.reranker import load_reranker, rerank
from pipeline.training.pairs import Pair, read_pairs, write_pairs
from pipeline.training.recipe import Recipe, plan_training
from tests.benchmarks.spine import machine
from tests.conftest import MINILM, SHARED_DATA

DATASETS = ("scifact", "cacm")
SEED, HELD_OUT = 1234, 0.2
DEPTH = 50
SIZES = (200, 400, 809)
"""Training queries of the cross-encoders of the curve."""
ENCODERS = {
    "in-batch": Recipe(epochs=3, batch=32, learning_rate=5e-5, negatives=0),
    "in-batch, rate 2e-5": Recipe(epochs=3, batch=32, learning_rate=2e-5, negatives=0),
    "in-batch, rate 1e-4": Recipe(epochs=3, batch=32, learning_rate=1e-4, negatives=0),
    "mined": Recipe(epochs=3, batch=32, learning_rate=5e-5, negatives=1),
    "mined, rate 2e-5": Recipe(epochs=3, batch=32, learning_rate=2e-5, negatives=1),
    "mined, rate 1e-4": Recipe(epochs=3, batch=32, learning_rate=1e-4, negatives=1),
    "mined, 2 negatives": Recipe(epochs=3, batch=32, learning_rate=5e-5, negatives=2),
}
RERANKER = Recipe(epochs=2, batch=4, learning_rate=5e-5, negatives=3, max_tokens=192)


DISTILLED = Recipe(epochs=3, batch=32, learning_rate=2e-5)
RERANKERS = {"from the model as shipped": None, "from the trained encoder": "mined"}
"""What a cross-encoder starts from, and its new last layer."""


class Bench:
    """The folder with everything that is made; what is there already is not made again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def config(self, name: str, dataset: str, *, model: Path | None = None, reranker: Path | None = None) -> str:
        """A config file whose live artifact is that of the first part of ``name``."""
        root = self.folder / f"{name.partition('+')[0]}-{dataset}"
        settings: dict[str, Any] = {"root": str(root), "corpus": {"uri": str(SHARED_DATA / dataset)}}
        if model:
            settings["encoder"] = {"model": str(model)}
        if reranker:
            settings["search"] = {"reranker": str(reranker), "rerank_depth": DEPTH}
        file = self.folder / f"{name}-{dataset}.yaml"
        file.write_text(json.dumps(settings))
        return str(file)

    def vecmill(self, *arguments: str) -> tuple[dict[str, Any], float]:
        """A command's result and its seconds."""
        started = time.perf_counter()
        command = [sys.executable, "-m", "jobs", *arguments, "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=HOME)
        text = done.stdout if done.stdout.startswith("{\n") else done.stdout.splitlines()[-1]
        return dict(json.loads(text)), round(time.perf_counter() - started, 1)

    def pairs(self, config: str, out: str, judgements: str, negatives: int) -> tuple[str, float]:
        file = self.folder / f"{out}.parquet"
        queries = str(SHARED_DATA / "scifact" / "queries.jsonl.gz")
        _, seconds = self.vecmill(
            *("mine", "-c", config, "--queries", queries, "--qrels", judgements, "--out", str(file)),
            *("--negatives", str(negatives)),
        )
        return str(file), seconds

    def train(self, kind: str, config: str, pairs: Sequence[Pair], recipe: Recipe, out: str, model: str | None = None) -> Path:
        from pipeline.training.trainer import train

        path = self.folder / "models" / out
        path.parent.mkdir(exist_ok=True)
        trained = train(plan_training(kind, load_config(config), pairs, recipe, path, model))  # type: ignore[arg-type]
        print(out, trained.steps, "steps", round(trained.seconds), "s", trained.losses[:1], trained.losses[-1:], flush=True)
        return path


class Dev:
    """The training queries, a fifth of them held out, and exact dense search over SciFact."""

    def __init__(self, folder: Path) -> None:
        data = SHARED_DATA / "scifact"
        with gzip.open(data / "corpus.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        self.texts = {row["_id"]: f"{row.get('title', '')} {row['text']}".strip() for row in rows}
        qrels = read_qrels(str(data / "qrels" / "train.tsv"), StoreConfig())
        self.queries = read_queries(str(data / "queries.jsonl.gz"), StoreConfig())
        names = sorted(qrels)
        order = np.random.default_rng(SEED).permutation(len(names))
        border = round(len(names) * HELD_OUT)
        self.qrels = {names[row]: qrels[names[row]] for row in np.sort(order[:border])}
        self.file = folder / "dev-train.tsv"
        self.file.write_text(
            "query-id\tcorpus-id\tscore\n"
            + "".join(
                f"{names[row]}\t{doc}\t{grade}\n" for row in np.sort(order[border:]) for doc, grade in qrels[names[row]].items()
            )
        )

    def found(self, model: str, depth: int) -> dict[str, list[str]]:
        """The nearest documents of each held-out query."""
        encoder = Encoder(resolve_spec(model=model, precision=resolve_here("auto"), backend="openvino")[0])
        vectors = encoder.encode_documents(list(self.texts.values())).astype(np.float16)
        asked = encoder.encode_queries([self.queries[name] for name in self.qrels])
        ids = list(self.texts)
        nearest = exact_search(vectors, asked, depth)[1]
        return {name: [ids[row] for row in answers] for name, answers in zip(self.qrels, nearest, strict=True)}

    def ndcg(self, ranked: Mapping[str, Sequence[str]]) -> float:
        return round(ir_metrics(self.qrels, ranked)["ndcg@10"], 4)

    def reranked(self, reranker: Path, found: Mapping[str, list[str]]) -> dict[str, list[str]]:
        loaded = load_reranker(str(reranker))
        return {
            name: [ids[row] for row in rerank(loaded.score(self.queries[name], [self.texts[doc] for doc in ids]))]
            for name, ids in found.items()
        }


def choose(bench: Bench) -> dict[str, Any]:
    """The choices, with what each would be worth on the held-out queries. Kept: it is half of the time."""
    kept = bench.folder / "dev.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text()))
    dev = Dev(bench.folder)
    base = bench.config("base", "scifact")
    bench.vecmill("reindex", "-q", "-c", base)
    pairs = read_pairs(bench.pairs(base, "dev", str(dev.file), 4)[0], load_config(base))
    found: dict[str, Any] = {"queries": len(dev.qrels), "pairs": len(pairs), "as shipped": dev.ndcg(dev.found(MINILM, 10))}
    for name, recipe in ENCODERS.items():
        out = bench.train("encoder", base, pairs, recipe, f"dev {name}")
        found[name] = dev.ndcg(dev.found(str(out), 10))
        print(name, found[name], flush=True)
    for kind in ("in-batch", "mined"):
        found[f"chosen {kind}"] = max((name for name in ENCODERS if name.startswith(kind)), key=lambda name: found[name])
    best = bench.folder / "models" / f"dev {found['chosen mined']}"
    near = dev.found(str(best), DEPTH)
    for name, start in RERANKERS.items():
        out = bench.train("reranker", base, pairs, RERANKER, f"dev reranker {name}", str(best) if start else MINILM)
        found[f"re-ranked, {name}"] = dev.ndcg(dev.reranked(out, near))
        print(name, found[f"re-ranked, {name}"], flush=True)
    found["chosen reranker"] = max(RERANKERS, key=lambda name: found[f"re-ranked, {name}"])
    kept.write_text(json.dumps(found))
    return found


def loop(bench: Bench, recipe: Recipe) -> dict[str, float]:
    """The commands of the README, one after the other, and the seconds of each."""
    kept = bench.folder / "loop.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text()))
    data = SHARED_DATA / "scifact"
    queries, out = str(data / "queries.jsonl.gz"), bench.folder / "models" / "mined"
    base, mined = bench.config("shipped", "scifact"), bench.config("mined", "scifact", model=out)
    seconds = {"reindex, as shipped": bench.vecmill("reindex", "-q", "-c", base)[1]}
    pairs, seconds["mine"] = bench.pairs(base, "train", str(data / "qrels" / "train.tsv"), 4)
    out.parent.mkdir(exist_ok=True)
    _, seconds["train-encoder"] = bench.vecmill(
        *("train-encoder", "-c", base, "--pairs", pairs, "--out", str(out), "--epochs", str(recipe.epochs)),
        *("--batch", str(recipe.batch), "--learning-rate", str(recipe.learning_rate), "--negatives", str(recipe.negatives)),
    )
    _, seconds["reindex, trained"] = bench.vecmill("reindex", "-q", "-c", mined)
    judged = ("--queries", queries, "--qrels", str(data / "qrels" / "test.tsv"))
    _, seconds["compare"] = bench.vecmill("compare", base, mined, *judged)
    seconds["all"] = round(sum(seconds.values()), 1)
    kept.write_text(json.dumps(seconds))
    print(seconds, flush=True)
    return seconds


def others(bench: Bench, dev: dict[str, Any]) -> None:
    """The models beside that of the loop: without negatives, cross-encoders of several sizes, what one of them teaches."""
    base = bench.config("shipped", "scifact")
    mined = bench.config("mined", "scifact", model=bench.folder / "models" / "mined")
    pairs = read_pairs(str(bench.folder / "train.parquet"), load_config(base))
    bench.train("encoder", base, pairs, ENCODERS[dev["chosen in-batch"]], "in-batch")
    hard = read_pairs(bench.pairs(mined, "hard", str(SHARED_DATA / "scifact" / "qrels" / "train.tsv"), 4)[0], load_config(base))
    names = sorted({str(pair.query_id) for pair in hard})
    np.random.default_rng(SEED).shuffle(names)
    start = MINILM if RERANKERS[dev["chosen reranker"]] is None else str(bench.folder / "models" / "mined")
    for size in SIZES:
        some = set(names[:size])
        bench.train("reranker", base, [pair for pair in hard if pair.query_id in some], RERANKER, f"reranker-{size}", start)
    config = bench.config("shipped+teacher", "scifact", reranker=bench.folder / "models" / f"reranker-{SIZES[-1]}")
    out = bench.folder / "models" / "distilled"
    if not out.exists():
        from pipeline.training.distillation import taught

        scored = bench.folder / "taught.parquet"
        if not scored.exists():
            write_pairs(str(scored), taught(pairs, load_config(config)), load_config(config))
        bench.train("distilled", mined, read_pairs(str(scored), load_config(base)), DISTILLED, "distilled")


def judge(bench: Bench) -> dict[str, Any]:
    """Every model's live artifacts, against the one as shipped; then what re-ranking adds."""
    found: dict[str, Any] = {}
    models = bench.folder / "models"
    for dataset in DATASETS:
        data = SHARED_DATA / dataset
        judged = (str(data / "queries.jsonl.gz"), str(data / "qrels" / "test.tsv"))
        configs = [bench.config("shipped", dataset)]
        configs += [bench.config(name, dataset, model=models / name) for name in ("in-batch", "mined", "distilled")]
        for config in configs:
            bench.vecmill("reindex", "-q", "-c", config)
        found[dataset] = told(compare(configs, *judged))
        mined = bench.config("mined", dataset, model=models / "mined")
        ranked = [
            bench.config(f"mined+{size}", dataset, model=models / "mined", reranker=models / f"reranker-{size}")
            for size in SIZES
        ]
        found[f"{dataset}, re-ranked"] = told(compare([mined, *ranked], *judged, rerank=True))
        print(json.dumps(found, indent=1), flush=True)
    return found


def told(comparison: Any) -> dict[str, Any]:
    """A comparison without texts of queries and paths of this machine."""
    found = comparison.model_dump(exclude={"differences": {"__all__": {"most_better", "most_worse"}}})
    for row in [*found["artifacts"], *found["differences"]]:
        row["name"] = Path(row["name"]).stem.rpartition("-")[0]
    for row in found["artifacts"]:
        row["model"] = Path(row["model"]).name
    return dict(found)


def main() -> None:
    bench = Bench(Path(sys.argv[1]).absolute())
    bench.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"measured": machine(), "recipes": {name: asdict(recipe) for name, recipe in ENCODERS.items()}}
    found["dev"] = choose(bench)
    found["loop_s"] = loop(bench, ENCODERS[found["dev"]["chosen mined"]])
    others(bench, found["dev"])
    found["test"] = judge(bench)
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
