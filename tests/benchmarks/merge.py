"""Measures the build of an index in shards and the memory of its merge; writes merge.json. Twenty minutes on 2 cores.

``python tests/benchmarks/merge.py FOLDER STATIC_MODEL``: FOLDER as for index.py. A million texts become an artifact by
``vecmill reindex`` in 8 shards, and again as 4 million (each four times, with a number added) at a byte per dimension: an
index of more than a gigabyte. The merge alone then runs again in a process of its own, for several limits of its memory.
What counts is anonymous memory above that of the process before it starts: libraries and what they hold come on top.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HOME = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HOME))

from pipeline.ann import index
from pipeline.artifacts.key_merge import LIBRARY_BYTES, Sources
from pipeline.artifacts.merging import merge
from pipeline.artifacts.publish import require_live
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.embed.coverage import cover
from pipeline.ingest.snapshot import parts, snapshot_of
from pipeline.root import layout
from pipeline.root.job import plan_job
from pipeline.root.manifest import list_records
from tests.benchmarks import debian
from tests.benchmarks.machine import machine

SHARDS = 8
ROOTS = {"default settings": (1, "auto"), "four times the texts, a byte per dimension": (4, "ivfsq8")}
LIMITS = (("default", None), ("half the index", 0.5), ("a quarter of the index", 0.25))


def main() -> None:
    folder = Path(sys.argv[1])
    texts = debian.documents_and_sentences(folder)
    found: dict[str, Any] = {"measured": machine()}
    for name, (copies, kind) in ROOTS.items():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            write_corpus(Path(scratch) / "corpus", texts, copies)
            file = Path(scratch) / "merge.yaml"
            file.write_text(
                f"root: {scratch}/root\ncorpus: {{uri: {scratch}/corpus}}\nindex: {{kind: {kind}}}\n"
                f"encoder: {{model: {sys.argv[2]}, precision: fp32}}\ncompute: {{unit_passages: {copies << 17}}}\n"
            )
            subprocess.run([sys.executable, "-m", "jobs", "reindex", "-c", str(file)], cwd=HOME, check=True)
            built = build(load_config(file))
            limits = {limit: share and int(share * built["index_bytes"]) for limit, share in LIMITS}
            merges = {limit: in_a_process(file, size) for limit, size in limits.items() if not size or size > LIBRARY_BYTES}
            found[name] = {"build": built, "merge": merges}
    target = Path(__file__).with_suffix(".json")
    target.write_text(json.dumps(found, indent=1) + "\n")
    print(target.read_text())


def write_corpus(folder: Path, texts: Sequence[str], copies: int) -> None:
    folder.mkdir()
    for number in range(SHARDS):
        with (folder / f"part-{number}.jsonl").open("w", encoding="utf-8") as out:
            for row in range(number, len(texts), SHARDS):
                for copy in range(copies):
                    text = f"{texts[row]} {copy}" if copy else texts[row]
                    out.write(json.dumps({"id": f"{row}-{copy}", "text": text}) + "\n")


def build(config: Config) -> dict[str, Any]:
    """Seconds of the parts of the build, from the records of the run."""
    job = plan_job(config, on_gpu=False)
    live = require_live(job.storage)
    shards = list_records(job.storage, layout.index_shards(live.index.trained)).values()
    merged = json.loads(next(Path(config.root).glob("runs/*/merge.json")).read_text())
    return {
        "passages": live.counts["passages"],
        "shards": len(shards),
        "kind": live.index.kind,
        "train_s": round(live.index.timings_s["total"], 2),
        "add_s": round(sum(record.timings_s["total"] for record in shards), 2),
        "merge_index_s": round(merged["timings_s"]["index"], 2),
        "merge_s": round(merged["timings_s"]["total"], 2),
        "index_bytes": live.index_bytes,
        "agreement": min(record.rates["agreement"] for record in shards),
    }


def in_a_process(file: Path, limit: int | None) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(merge_alone, (str(file), limit))


def merge_alone(file: str, limit: int | None) -> dict[str, Any]:
    overrides = (f"compute.merge_memory={limit}",) if limit else ()
    job = plan_job(load_config(file, overrides), on_gpu=False)
    index.set_threads(1)
    live = require_live(job.storage)
    snapshot = snapshot_of(job.storage, live)
    sources = Sources(job, parts(job.storage, snapshot), cover(job, snapshot).left_out, job.embedding_records(), live.index)
    started = time.perf_counter()
    merged = merge(sources, f"bench-{limit}")
    seconds = time.perf_counter() - started
    for name in merged.files:
        Path(job.storage.at(f"{layout.artifact(merged.version)}/{name}")).unlink()
    return {
        "merge_memory": limit or job.config.compute.merge_memory,
        "peak_bytes": merged.memory_bytes,
        "seconds": round(seconds, 2),
        "index_s": round(merged.timings_s["index"], 2),
        "parts": len(merged.parts),
    }


if __name__ == "__main__":
    main()
