"""Measures the embed stage with 1 to 64 encoders that sleep as long as a GPU would work; writes simulated.json. 20 minutes.

``python tests/benchmarks/simulated.py``. The stage is the pipeline's own (``embed._run``), and so are Ray Data, the shards and
their records; simulated are the texts, which come tokenized, and the arithmetic: an encoder sleeps for the tokens of a unit,
and then has vectors. No torch is imported. A GPU's unit of 32,768 passages is two minutes of such an encoder; here units are
16 seconds, and 2 in a last run, which shows what saturates first. Efficiency is the share of the time of all encoders in which
they encode, from the first unit of the last one that started to the end of the last unit, the end where some are idle
included. How many cores must tokenize to feed a GPU is told apart, from the rate of one core on real texts.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["RAYON_NUM_THREADS"] = "1"

HOME = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HOME))
os.environ["PYTHONPATH"] = str(HOME)

import numpy as np
import ray
import ray.data

from jobs.demo_corpus import docstrings
from pipeline.embed.embeddings import EmbedUnit
from pipeline.embed.tokenized import NO_SPANS, TokenizedUnit
from pipeline.encoder import Encoded
from pipeline.encoding.tokenizer import TextTokenizer
from pipeline.fingerprint import sha256
from pipeline.root.job import plan_job
from pipeline.root.shards import KEY_DTYPE
from pipeline.stages import embed
from pipeline.stages.cluster import Cluster
from tests.benchmarks.machine import machine
from tests.benchmarks.processes import cpu_seconds, spilled_bytes
from tests.conftest import make_config

RUNS = ((64, 16, 24), (8, 16, 12), (1, 16, 12), (64, 2, 12))
"""How many encoders, for how many seconds each has work in one unit, and how many units there are for each."""
TOKENS_PER_S = 100_000
"""Of a simulated GPU."""
PASSAGE_TOKENS = 400
PASSAGES_PER_S = TOKENS_PER_S // PASSAGE_TOKENS
DIM = 384
RAY_CPUS = 8
"""That Ray hands out, of the two that are there: who tokenizes and who encodes here only waits."""


class SleepingEncoder:
    """Takes as long as a GPU of ``TOKENS_PER_S``, and uses no core meanwhile."""

    flops_per_token = 0.0
    batch_tokens = 0

    def __init__(self, spec: Any, log: Path) -> None:
        self.spec = spec
        self._log = log
        most = PASSAGES_PER_S * max(unit_s for _, unit_s, _ in RUNS)
        self._vectors = np.eye(DIM, dtype=np.float32)[np.arange(most) % DIM]

    def encode_tokens(self, tokens: Any, *, prompt: str, windows: Any) -> Encoded:
        """A vector for each text."""
        started, count = time.time(), sum(map(len, tokens))
        time.sleep(count / TOKENS_PER_S)
        with self._log.open("a") as file:
            file.write(json.dumps([os.getpid(), started, time.time()]) + "\n")
        return Encoded(self._vectors[: len(tokens)], count, count, 0, {})


class SleepingActor(embed.EncoderActor):
    """An encoder's actor without a model."""

    def __init__(self, spec: Any, storage: Any, folder: str, threads: int, calibrate: bool) -> None:
        super().__init__(spec, storage, folder, threads, calibrate)
        assert "torch" not in sys.modules

    def _load(self, spec: Any, threads: int, calibrate: bool) -> Any:
        return SleepingEncoder(spec, Path(self._storage.uri) / f"{os.getpid()}.log")


def tokenized_row(row: dict[str, Any], spec: Any, storage: Any) -> dict[str, Any]:
    """A unit as if its texts were read and tokenized."""
    unit = EmbedUnit.model_validate_json(row["unit"])
    rng = np.random.default_rng(int(unit.name[:8], 16))
    keys = np.sort(np.frombuffer(rng.bytes(unit.passages * KEY_DTYPE.itemsize), dtype=KEY_DTYPE))
    lengths, ones = np.full(unit.passages, PASSAGE_TOKENS, dtype=np.int32), np.ones(unit.passages, dtype=np.int32)
    ids = np.full(unit.passages * PASSAGE_TOKENS, 7, dtype=np.int32)
    return {
        **TokenizedUnit(unit.name, keys, ids, lengths, ones, NO_SPANS, {"read": 0.0, "tokenize": 0.0}).as_row(),
        "retries": 0,
    }


def main() -> None:
    embed.EncoderActor = SleepingActor  # type: ignore[misc]
    embed._tokenize_row = tokenized_row
    rate = tokenizer_rate()
    found: dict[str, Any] = {
        "measured": machine(),
        "gpu": {"tokens_per_s": TOKENS_PER_S, "passages_per_s": PASSAGES_PER_S, "dim": DIM},
        "tokenizer": {"tokens_per_s_per_core": rate, "cores_per_gpu": round(TOKENS_PER_S / rate, 3)},
        "actors": [],
    }
    for run in RUNS:
        found["actors"].append(simulate(*run))
        print(json.dumps(found["actors"][-1]), flush=True)
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


def simulate(actors: int, unit_s: int, units_each: int) -> dict[str, Any]:
    """The embed stage over as many units for each of so many encoders."""
    count, passages = actors * units_each, PASSAGES_PER_S * unit_s
    units = [EmbedUnit(name=sha256(f"{actors} {number}".encode())[:20], picks=(), passages=passages) for number in range(count)]
    with tempfile.TemporaryDirectory(prefix="vm", dir="/tmp") as folder:
        compute = {"encoders": actors, "cpus_per_encoder": 1}
        config = make_config(f"{folder}/root", f"{folder}/corpus", compute=compute, store={"embeddings": f"{folder}/store"})
        Path(folder, "store").mkdir()
        ray.init(
            address="local", num_cpus=RAY_CPUS, include_dashboard=False, object_store_memory=4 << 30, log_to_driver=False,
            _temp_dir=f"{folder}/ray", _system_config={"enable_metrics_collection": False},
        )  # fmt: skip
        try:
            ray.data.DataContext.get_current().enable_progress_bars = False
            job = plan_job(config, on_gpu=False)
            with cpu_seconds() as used:
                began = time.time()
                records = embed._run(job, _Cluster(1, 2, 0.0, 2), units, count * passages)
                wall = time.time() - began
        finally:
            ray.shutdown()
        spilled = spilled_bytes(Path(folder, "ray"))
        assert len(records) == count
        spans = [json.loads(line) for file in Path(folder, "store").glob("*.log") for line in file.read_text().splitlines()]
    counts = {"actors": actors, "unit_s": unit_s, "units": count, "spilled_bytes": spilled}
    return counts | {"wall_s": round(wall, 1), "cpu_s": round(used[0], 1)} | told(spans, actors)


def told(spans: list[list[float]], actors: int) -> dict[str, Any]:
    """Efficiency of encoders with (process, start, end) of each unit."""
    by_actor: dict[float, list[list[float]]] = {}
    for pid, start, end in spans:
        by_actor.setdefault(pid, []).append([start, end])
    assert len(by_actor) == actors
    first = max(min(start for start, _ in own) for own in by_actor.values())
    last = max(end for _, _, end in spans)
    busy = sum(max(0.0, end - max(start, first)) for _, start, end in spans)
    return {
        "all_started_s": round(first - min(start for _, start, _ in spans), 1),
        "steady_s": round(last - first, 1),
        "efficiency": round(busy / (actors * (last - first)), 4),
        "units_per_actor": [min(map(len, by_actor.values())), max(map(len, by_actor.values()))],
    }


class _Cluster(Cluster):
    """Books next to nothing for an encoder that sleeps."""

    def reserved_cpus(self, compute: Any) -> float:
        """CPUs of an encoder."""
        return 0.01


def tokenizer_rate() -> float:
    """Tokens per second that one core makes of real texts."""
    job = plan_job(make_config("/nowhere/root", "/nowhere/corpus"), on_gpu=False)
    tokenizer = TextTokenizer(job.model, job.spec.max_tokens)
    texts = [row["text"] for row in docstrings()]
    best = 0.0
    for batch in _batches(texts, len(texts) // 3):
        started = time.perf_counter()
        best = max(best, sum(map(len, tokenizer(batch))) / (time.perf_counter() - started))
    return round(best)


def _batches(texts: list[str], size: int) -> Iterator[list[str]]:
    for first in range(0, len(texts) - size + 1, size):
        yield texts[first : first + size]


if __name__ == "__main__":
    main()
