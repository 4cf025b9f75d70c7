"""Measures ``vecmill plan`` against what happens: the demo's corpus and 100,000 texts; writes plan.json. Fifteen minutes.

``python tests/benchmarks/plan.py FOLDER``: FOLDER as for index.py. Each corpus is planned from a sample and in full, before
anything is known of it; then it is indexed, and the run's own records say what it took.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HOME = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HOME))

from jobs.demo_corpus import docstrings
from pipeline.artifacts.publish import require_live
from pipeline.config_file import parse_config
from pipeline.ingest.snapshot import snapshot_of
from pipeline.root.job import plan_job
from pipeline.root.manifest import MergeRecord
from tests.benchmarks import debian
from tests.benchmarks.machine import machine

DOCUMENTS = 100_000


def main() -> None:
    folder = Path(sys.argv[1])
    corpora = {
        "demo": [{"id": row["id"], "text": row["text"]} for row in docstrings()],
        "100k": [{"id": str(number), "text": text} for number, text in enumerate(debian.documents(folder)[:DOCUMENTS])],
    }
    found = {"measured": machine()}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for name, rows in corpora.items():
            found[name] = measure(Path(scratch) / name, rows)
            print(json.dumps(found[name], indent=1), flush=True)
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


def measure(home: Path, rows: list[dict[str, str]]) -> dict[str, Any]:
    home.mkdir(parents=True)
    (home / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {"root": str(home / "root"), "corpus": {"uri": str(home / "corpus.jsonl")}}
    (home / "c.yaml").write_text(json.dumps(settings))
    plans = {"sampled": vecmill(home, "plan"), "full": vecmill(home, "plan", "--full")}
    vecmill(home, "reindex", "-q")
    actual = taken(settings)
    return {
        "actual": actual,
        **plans,
        "ratio": {
            name: {item: round(plan[item] / actual[item], 4) for item in actual if actual[item]} for name, plan in plans.items()
        },
    }


def taken(settings: dict[str, Any]) -> dict[str, float]:
    """What the run made and took: seconds of encoding by one encoder, bytes on disk, memory of the merge."""
    job = plan_job(parse_config(settings), on_gpu=False)
    live = require_live(job.storage)
    shards = job.embedding_records()
    (merged,) = (MergeRecord.model_validate_json(file.read_bytes()) for file in Path(job.storage.uri).glob("runs/*/merge.json"))
    return {
        "documents": live.counts["documents"],
        "passages": snapshot_of(job.storage, live).counts["passages"],
        "embedding_bytes": sum(file.size_bytes for record in shards for file in record.files),
        "index_bytes": live.index_bytes,
        "artifact_bytes": sum(file.size_bytes for file in live.files.values()),
        "encode_s": round(sum(record.timings_s["encode"] for record in shards), 1),
        "merge_memory_bytes": merged.memory_bytes or 0,
    }


def vecmill(home: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "jobs", *arguments, "-c", str(home / "c.yaml"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HOME)
    return dict(json.loads(done.stdout if arguments[0] == "plan" else done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
