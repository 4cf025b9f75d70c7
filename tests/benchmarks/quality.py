"""Measures what bytes per vector cost in retrieval quality; writes quality.json. An hour on 2 slow cores.

``python tests/benchmarks/quality.py FOLDER``: where training.py keeps its models and roots. ``compress``, which is what
``vecmill tune --report`` tells, over SciFact, CACM and XQuAD from ../shared/data as MiniLM sees them; exact search alone over
the first two as the same model sees them after training with and without Matryoshka. Search settings are those of recall@10
0.99 on held-out passages, never chosen on judged queries; nDCG@10 of exact search in all dimensions is what they are held
against.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HOME = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HOME))

from pipeline.ann.vectors import to_float32
from pipeline.artifacts.live import open_live
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.reports.compression import Compression, compress, exact_by_dim, judge_of
from pipeline.run import reindex
from tests.benchmarks.machine import machine
from tests.benchmarks.training import DATASETS, IN_BATCH, Bench
from tests.conftest import SHARED_DATA

MATRYOSHKA = replace(IN_BATCH, dims=(192, 96))
TRAINED = ("in-batch", "matryoshka")


def main() -> None:
    bench = Bench(Path(sys.argv[1]).absolute())
    bench.train("encoder", MATRYOSHKA, "matryoshka")
    shipped = {name: compressed(bench, "shipped", name) for name in (*DATASETS, "xquad")}
    found: dict[str, Any] = {"measured": machine(), "matryoshka": asdict(MATRYOSHKA)}
    found["exact"] = {"shipped": {name: each.exact for name, each in shipped.items()}}
    for model in TRAINED:
        found["exact"][model] = {name: by_dim(indexed(bench, model, name)) for name in DATASETS}
        print(model, found["exact"][model], flush=True)
    found["shipped"] = {name: each.model_dump(mode="json") for name, each in shipped.items()}
    found["ratios"] = ratios(list(shipped.values()))
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({"exact": found["exact"], "ratios": found["ratios"]}, indent=1))


def indexed(bench: Bench, model: str, dataset: str) -> Config:
    """The config of a dataset's live index, with its test queries."""
    data = SHARED_DATA / dataset
    config = bench.config(model, dataset, model=None if model == "shipped" else bench.folder / "models" / model)
    judged = (f"evaluation.queries={data / 'queries.jsonl.gz'}", f"evaluation.qrels={data / 'qrels' / 'test.tsv'}")
    settings = load_config(config, (*judged, "index.target_recall=0.99"))
    reindex(settings)
    return settings


def compressed(bench: Bench, model: str, dataset: str) -> Compression:
    """The compressions of a dataset's vectors; made once."""
    kept = bench.folder / f"compressed-{model}-{dataset}.json"
    if not kept.is_file():
        kept.write_text(compress(indexed(bench, model, dataset)).model_dump_json())
        print(kept.name, flush=True)
    return Compression.model_validate_json(kept.read_text())


def by_dim(config: Config) -> dict[int, float]:
    """nDCG@10 of exact search over leading dimensions, as ``compress`` measures it."""
    opened = open_live(config)
    full, judged = to_float32(opened.partition.collection.vectors[:]), judge_of(config, opened)
    assert judged is not None
    return exact_by_dim(full, judged)


def ratios(measured: Sequence[Compression]) -> list[dict[str, Any]]:
    """Of each compression the share of exact search's quality, least and mean of the datasets."""
    told = []
    for same in zip(*(each.rows for each in measured), strict=True):
        shares = [(row.quality or 0.0) / each.exact[each.dim] for each, row in zip(measured, same, strict=True)]
        one = same[0]
        assert {(row.kind, row.dim, row.bits_per_dimension, row.rescore) for row in same} == {
            (one.kind, one.dim, one.bits_per_dimension, one.rescore)
        }
        told.append(
            {
                "kind": one.kind, "dim": one.dim, "bits": one.bits_per_dimension, "rescore": one.rescore,
                "memory, bits per dimension of the model": round(one.bits_per_dimension * one.dim / measured[0].dim, 4),
                "mean": round(sum(shares) / len(shares), 4), "least": round(min(shares), 4),
            }
        )  # fmt: skip
    return told


if __name__ == "__main__":
    main()
