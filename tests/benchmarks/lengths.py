"""Measures what becomes of long documents: cut, split, pooled, chunked late; writes lengths.json. Half an hour on 2 cores.

``python tests/benchmarks/lengths.py FOLDER``: that of training.py, run before; again, it goes on where it was cut short.
SciFact (abstracts, seven in ten over MiniLM's 256 tokens) from ../shared/data, its test queries, vecmill's defaults but for
what a row names. MiniLM has positions for 512 tokens, twice its limit: long context as far as it is to be had here.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HOME = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HOME))

from pipeline.config_file import load_config
from pipeline.reports.comparison import compare
from pipeline.run import reindex
from tests.benchmarks.machine import machine
from tests.benchmarks.training import told
from tests.conftest import SHARED_DATA

DATASETS = ("scifact",)
WAYS: dict[str, dict[str, Any]] = {
    "cut at 256": {"passages": {"long": "truncate"}},
    "windows of 256": {},
    "windows of 128": {"passages": {"tokens": 128}},
    "mean of windows of 256": {"passages": {"pool": "mean"}},
    "cut at 512": {"passages": {"long": "truncate"}, "encoder": {"max_tokens": 512}},
    "windows of 128, late, of 512": {"passages": {"late": True, "tokens": 128}, "encoder": {"max_tokens": 512}},
}


def main() -> None:
    folder = Path(sys.argv[1]).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"measured": machine()}
    for name in DATASETS:
        found[name] = dataset(folder, name)
        print(name, json.dumps(found[name], indent=1), flush=True)
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


def dataset(folder: Path, name: str) -> dict[str, Any]:
    data, configs, counts = SHARED_DATA / name, [], {}
    for number, (way, sections) in enumerate(WAYS.items()):
        file = folder / f"length-{number}-{name}.yaml"
        settings = {"root": str(folder / file.stem), "corpus": {"uri": str(data)}, **sections}
        file.write_text(json.dumps(settings | {"store": {"embeddings": str(folder / "embeddings")}}))
        counts[way] = reindex(load_config(str(file))).snapshot.counts
        configs.append(str(file))
    compared = told(compare(configs, str(data / "queries.jsonl.gz"), str(data / "qrels" / "test.tsv")))
    for way, row in zip(WAYS, compared["artifacts"], strict=True):
        row["name"] = way
        row["counts"] = {key: counts[way][key] for key in ("documents", "passages", "split", "truncated", "tokens")}
    for number, row in enumerate(compared["differences"]):
        row["name"] = list(WAYS)[1 + number // (len(compared["differences"]) // (len(WAYS) - 1))]
    return compared


if __name__ == "__main__":
    main()
