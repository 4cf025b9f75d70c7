"""Measures how a whole ``reindex`` grows from 10,000 to a million passages; writes scale.json. Half an hour on 2 slow cores.

``python tests/benchmarks/scale.py FOLDER STATIC [MODEL SIZE ...]``: FOLDER as for index.py, STATIC a folder with a static
model, by which all sizes are encoded, so that what is measured is the pipeline and not a model; ``minilm 10000`` adds a size
by MiniLM; ``requests`` instead counts those of S3 anew and measures nothing else. Each run is the command over JSON lines in
files of 25,000 documents, on local files. Exponents are of wall time above that of the same command over ten documents. Memory
is that of a process without mapped files (RssAnon), the most that a sample saw. Requests are those of a root on SeaweedFS,
counted by a proxy before it. scale.svg is the README's plot of it.
"""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HOME = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HOME))

from pipeline.config_file import load_config
from pipeline.root.job import plan_job
from pipeline.root.journal import last_runs
from pipeline.root.storage import Storage
from tests.benchmarks import debian
from tests.benchmarks.machine import machine
from tests.benchmarks.processes import cpu_seconds, spilled_bytes, watched
from tests.conftest import seaweed, write_jsonl
from tests.faults.proxy import faults_before

SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000)
COUNTED = (10_000, 100_000)
"""Sizes whose requests to an object store are counted."""
START_UP, FROM = 10, 30_000
FILE_DOCUMENTS = 25_000


def main() -> None:
    folder, static = Path(sys.argv[1]).absolute(), str(Path(sys.argv[2]).absolute())
    texts = debian.documents_and_sentences(folder)
    encoders = {"static": {"model": static}, "minilm": {}}
    file = Path(__file__).with_suffix(".json")
    if sys.argv[3:] == ["requests"]:
        file.write_text(json.dumps(json.loads(file.read_text()) | count_requests(folder, texts, encoders), indent=1) + "\n")
        return
    asked = [("static", size) for size in SIZES] + list(zip(sys.argv[3::2], map(int, sys.argv[4::2]), strict=True))
    found: dict[str, Any] = {"measured": machine(), "documents": len(texts), "start_up": {}, "runs": []}
    for model in dict.fromkeys(model for model, _ in asked):
        measure(folder / "scale", texts[:START_UP], encoders[model])  # the first run of a machine traces a model
        found["start_up"][model] = measure(folder / "scale", texts[:START_UP], encoders[model])["wall_s"]
    for model, size in asked:
        found["runs"].append({"model": model} | measure(folder / "scale", texts[:size], encoders[model]))
        print(json.dumps(found["runs"][-1]), flush=True)
    for model in found["start_up"]:
        exponents([run for run in found["runs"] if run["model"] == model], found["start_up"][model])
    found |= count_requests(folder, texts, encoders)
    file.write_text(json.dumps(found, indent=1) + "\n")
    draw(
        [run for run in found["runs"] if run["model"] == "static"],
        found["start_up"]["static"],
        Path(__file__).with_suffix(".svg"),
    )


def count_requests(folder: Path, texts: list[str], encoders: dict[str, dict[str, str]]) -> dict[str, Any]:
    counted = [requests(folder / "scale", texts[:size], encoders["static"]) for size in COUNTED]
    return {"requests": counted, "requests_measured": machine()}


def measure(home: Path, texts: list[str], encoder: dict[str, str]) -> dict[str, Any]:
    """A run from nothing on local files."""
    with prepared(home, texts) as corpus:
        config = write_config(home, corpus, f"{home}/root", encoder)
        with cpu_seconds() as cpu:
            result, wall_s, memory = reindex(config)
        (state,) = last_runs(Storage(f"{home}/root"), 1)
        live = result["live"]
        stored = sum(file.stat().st_size for file in (home / "root").rglob("*") if file.is_file())
        return {
            "documents": len(texts), "passages": live["passages"], "kind": live["index"]["kind"],
            "recall": live["recall"]["mean"], "wall_s": wall_s, "cpu_s": round(cpu[0], 1),
            "stages_s": {stage.stage: round(stage.elapsed_s, 2) for stage in state.stages if stage.elapsed_s >= 0.01},
            "corpus_bytes": sum(file.stat().st_size for file in corpus.iterdir()), "root_bytes": stored, **memory,
        }  # fmt: skip


def requests(home: Path, texts: list[str], encoder: dict[str, str]) -> dict[str, Any]:
    """Requests of a run whose root is a bucket, and of the next, which finds nothing to do."""
    found: dict[str, Any] = {"documents": len(texts)}
    with prepared(home, texts) as corpus, seaweed() as server, faults_before(server.endpoint, 0.0) as proxy:
        s3 = server.store["s3"] | {"endpoint_url": proxy.endpoint}
        config = write_config(home, corpus, f"s3://test/scale-{len(texts)}", encoder, store={"s3": s3})
        for name in ("first", "idle"):
            before = Counter(proxy.methods)
            reindex(config)
            found[name] = dict(sorted((proxy.methods - before).items()))
        found["shards"] = len(plan_job(load_config(config), on_gpu=False).embedding_records())
    return found


@contextlib.contextmanager
def prepared(home: Path, texts: list[str]) -> Iterator[Path]:
    """A corpus in files, for the length of a block."""
    corpus = home / "corpus"
    corpus.mkdir(parents=True)
    try:
        for first in range(0, len(texts), FILE_DOCUMENTS):
            numbered = enumerate(texts[first : first + FILE_DOCUMENTS], first)
            write_jsonl(corpus / f"{first:07d}.jsonl", ({"id": str(number), "text": text} for number, text in numbered))
        yield corpus
    finally:
        shutil.rmtree(home)


def write_config(home: Path, corpus: Path, root: str, encoder: dict[str, str], **sections: Any) -> Path:
    config = home / "config.yaml"
    config.write_text(json.dumps({"root": root, "corpus": {"uri": str(corpus)}, "encoder": encoder, **sections}))
    load_config(config)
    return config


def reindex(config: Path) -> tuple[dict[str, Any], float, dict[str, int]]:
    """The command's result, its wall seconds, and the memory of its processes."""
    command = [sys.executable, "-m", "jobs", "reindex", "-c", str(config), "--json", "-q"]
    with tempfile.TemporaryDirectory(prefix="vm", dir="/tmp") as temporary:  # Ray's socket paths have a length limit
        started = time.perf_counter()
        run = subprocess.Popen(command, cwd=HOME, stdout=subprocess.PIPE, text=True, env=os.environ | {"RAY_TMPDIR": temporary})
        with watched(run.pid) as peaks:
            output = run.communicate()[0]
        wall_s = round(time.perf_counter() - started, 1)
        if run.returncode:
            raise SystemExit(f"vecmill reindex ended with {run.returncode}")
        peaks["spilled"] = spilled_bytes(Path(temporary))
    return json.loads(output.splitlines()[-1]), wall_s, {f"{name}_bytes": size for name, size in peaks.items()}


def exponents(runs: list[dict[str, Any]], start_up: float) -> None:
    """Growth of wall time as an exponent of passages, above start-up: over the run before, and from ``FROM`` passages on."""

    def between(before: dict[str, Any], run: dict[str, Any]) -> float:
        times = [max(each["wall_s"] - start_up, 0.1) for each in (before, run)]
        return round(math.log(times[1] / times[0]) / math.log(run["passages"] / before["passages"]), 3)

    for before, run in pairwise(runs):
        run["exponent"] = between(before, run)
    large = [run for run in runs if run["documents"] >= FROM]
    for run in large[1:]:
        run["exponent_from_30000"] = between(large[0], run)


def draw(runs: list[dict[str, Any]], start_up: float, file: Path) -> None:
    """Time of the whole and of each stage beside a line of exponent 1, and memory, over passages."""
    import matplotlib
    from matplotlib.figure import Figure

    sizes = [run["passages"] for run in runs]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vecmill", "font.size": 9}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        time_axes, memory_axes = figure.subplots(1, 2)
        whole = [run["wall_s"] - start_up for run in runs]
        time_axes.plot(sizes, whole, marker="o", color="black", label="whole command")
        for stage in dict.fromkeys(stage for run in runs for stage in run["stages_s"]):
            time_axes.plot(sizes, [run["stages_s"].get(stage, math.nan) for run in runs], marker=".", label=stage)
        line = [whole[-1] * size / sizes[-1] for size in sizes]
        time_axes.plot(sizes, line, color="grey", linestyle=":", label="exponent 1")
        time_axes.set(
            xscale="log", yscale="log", ylim=(0.5, 2500), xlabel="passages", ylabel="seconds; the whole above start-up"
        )
        for name in ("driver", "worker"):
            memory_axes.plot(
                sizes, [run[f"{name}_bytes"] / 1e6 for run in runs], marker="o", label=f"{name}, most of one process"
            )
        memory_axes.set(xscale="log", ylim=(0, None), xlabel="passages", ylabel="MB of its own")
        for axes, columns in ((time_axes, 2), (memory_axes, 1)):
            axes.grid(linewidth=0.3)
            axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=columns)
        figure.savefig(file, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
