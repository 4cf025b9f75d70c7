"""Measures what training on few judgements does to retrieval; writes training.json. An hour on 2 slow cores.

``python tests/benchmarks/training.py FOLDER``: where everything is kept; run again, it goes on where it was cut short.
SciFact (../shared/data): its 809 training queries train the models that its 300 test queries judge. No choice is made on
either: recipes are the defaults of the commands, fixed before the first training, but for ``--max-tokens`` and the three
negatives of the cross-encoder, which are for time, and its learning rate, whose default curve.py has raised since. CACM is
judged too and never trained on. The loop is the commands of the README, each timed; quality is that of the live artifacts, as
``vecmill compare`` tells it.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HOME = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HOME))


from pipeline.config_file import load_config
from pipeline.reports.comparison import compare
from pipeline.training.pairs import read_pairs
from pipeline.training.recipe import Kind, Recipe, plan_training
from tests.benchmarks.machine import machine
from tests.conftest import SHARED_DATA

DATASETS = ("scifact", "cacm")
MAX_TOKENS = 128
IN_BATCH = Recipe(epochs=2, batch=32, learning_rate=5e-5, negatives=0, max_tokens=MAX_TOKENS)
RERANKER = Recipe(epochs=2, batch=4, learning_rate=5e-5, negatives=3, max_tokens=MAX_TOKENS)
LATE = Recipe(epochs=2, batch=32, learning_rate=5e-5, negatives=1, max_tokens=MAX_TOKENS)


class Bench:
    """The folder with everything that is made; what is there already is not made again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def config(self, name: str, dataset: str, *, model: Path | None = None) -> str:
        settings: dict[str, Any] = {
            "root": str(self.folder / f"{name}-{dataset}"),
            "corpus": {"uri": str(SHARED_DATA / dataset)},
            "passages": {"long": "truncate"},
            "store": {"embeddings": str(self.folder / "embeddings")},
        } | ({"encoder": {"model": str(model)}} if model else {})
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

    def pairs(self, config: str, out: str) -> tuple[str, float]:
        """Mined pairs of SciFact's training queries, and the seconds that took."""
        file, data = self.folder / f"{out}.parquet", SHARED_DATA / "scifact"
        judged = ("--queries", str(data / "queries.jsonl.gz"), "--qrels", str(data / "qrels" / "train.tsv"))
        return str(file), self.vecmill("mine", "-c", config, *judged, "--out", str(file))[1]

    def train(self, kind: Kind, recipe: Recipe, out: str) -> None:
        """A model that SciFact's training queries train, from MiniLM as shipped."""
        from pipeline.training.trainer import train

        settings = load_config(self.config("shipped", "scifact"))
        pairs = read_pairs(str(self.folder / "train.parquet"), settings)
        trained = train(plan_training(kind, settings, pairs, recipe, self.folder / "models" / out))
        print(out, trained.steps, "steps", round(trained.seconds), "s", trained.losses[:1], trained.losses[-1:], flush=True)


def loop(bench: Bench) -> dict[str, float]:
    """The commands of the README, one after the other, and the seconds of each."""
    kept = bench.folder / "loop.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text()))
    data = SHARED_DATA / "scifact"
    queries, out = str(data / "queries.jsonl.gz"), bench.folder / "models" / "mined"
    base, mined = bench.config("shipped", "scifact"), bench.config("mined", "scifact", model=out)
    out.parent.mkdir(exist_ok=True)
    seconds = {"reindex, as shipped": bench.vecmill("reindex", "-q", "-c", base)[1]}
    pairs, seconds["mine"] = bench.pairs(base, "train")
    train = ("train-encoder", "-c", base, "--pairs", pairs, "--out", str(out), "--max-tokens", str(MAX_TOKENS))
    seconds["train-encoder"] = bench.vecmill(*train)[1]
    seconds["reindex, trained"] = bench.vecmill("reindex", "-q", "-c", mined)[1]
    judged = ("--queries", queries, "--qrels", str(data / "qrels" / "test.tsv"))
    seconds["compare"] = bench.vecmill("compare", base, mined, *judged)[1]
    seconds["all"] = round(sum(seconds.values()), 1)
    kept.write_text(json.dumps(seconds))
    print(seconds, flush=True)
    return seconds


def others(bench: Bench) -> None:
    """Models beside that of the loop: re-rankers for retrieval.py, and an encoder without mined negatives."""
    bench.train("reranker", RERANKER, "reranker")
    bench.train("late", LATE, "late")
    bench.train("encoder", IN_BATCH, "in-batch")


def judge(bench: Bench) -> dict[str, Any]:
    """Every model's live artifacts, against the one as shipped."""
    found: dict[str, Any] = {}
    for dataset in DATASETS:
        data = SHARED_DATA / dataset
        judged = (str(data / "queries.jsonl.gz"), str(data / "qrels" / "test.tsv"))
        configs = [bench.config("shipped", dataset)]
        configs += [bench.config(name, dataset, model=bench.folder / "models" / name) for name in ("in-batch", "mined")]
        for config in configs:
            bench.vecmill("reindex", "-q", "-c", config)
        found[dataset] = told(compare(configs, *judged))
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
    recipes = {"in-batch": IN_BATCH, "reranker": RERANKER, "late": LATE}
    found: dict[str, Any] = {"measured": machine(), "recipes": {name: asdict(recipe) for name, recipe in recipes.items()}}
    found["loop_s"] = loop(bench)
    others(bench)
    found["test"] = judge(bench)
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
