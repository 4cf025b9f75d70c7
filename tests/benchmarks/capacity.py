"""What a thousand million passages of 1,024 dimensions would take, from what was measured; writes capacity.json. A minute.

``python tests/benchmarks/capacity.py``. Constants come from the JSON files beside this one and from the code that plans a run;
the anti-join is measured here. What nobody here could measure, prices and a whole run on GPUs, is assumed and named so.
"""

import json
import os
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

HOME = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HOME))

import numpy as np
import pyarrow as pa

from pipeline.ann.index_plan import ID_BYTES, choose, code_bytes, is_coded
from pipeline.artifacts.merging import part_sizes
from pipeline.config import Config
from pipeline.config_what import IndexConfig
from pipeline.embed import anti_join
from pipeline.embed.embeddings import MAX_UNIT_PASSAGES
from pipeline.ingest.snapshot import Part
from pipeline.operations.forecast import PASSAGE_BYTES, Ahead, sizes
from pipeline.root import layout
from pipeline.root.manifest import DataFile, Record
from pipeline.root.shards import KEY_BYTES, KEY_DTYPE, fixed_binary, parquet_bytes
from pipeline.root.storage import Storage
from pipeline.search.document_files import FILE_ROWS
from tests.benchmarks.machine import machine
from tests.benchmarks.simulated import TOKENS_PER_S
from tests.conftest import make_config

PASSAGES, DIM = 1_000_000_000, 1024
ASSUMED: dict[str, float] = {
    "gpus": 64, "tokens_per_s_per_gpu": TOKENS_PER_S, "tokens_per_passage": 150, "text_bytes_per_passage": 400,
    "cores_beside_each_gpu": 8, "usd_per_gpu_hour": 2.5, "usd_per_1000_puts": 0.005, "usd_per_1000_gets": 0.0004,
    "usd_per_gb_month": 0.023,
}  # fmt: skip
JOINED, FILES, RANGES = 2_000_000, 64, 16
"""Keys of a snapshot and as many of a store, half of them shared; files as large as the pipeline makes them, on this disk."""


def main() -> None:
    home = Path(__file__).parent
    measured = {name: json.loads((home / f"{name}.json").read_text()) for name in ("index", "merge", "scale", "simulated")}
    plan = choose(IndexConfig(), PASSAGES, DIM)
    assert is_coded(plan.kind)
    found: dict[str, Any] = {"measured": machine(), "passages": PASSAGES, "dim": DIM, "assumed": ASSUMED}
    found["plan"] = {name: getattr(plan, name) for name in ("kind", "nlist", "m", "nbits", "train_vectors")}
    found["anti_join"] = join = measure_join()
    found["encode"] = encode(measured["simulated"])
    tokens, texts = (PASSAGES * ASSUMED[f"{name}_per_passage"] for name in ("tokens", "text_bytes"))
    ahead = Ahead(PASSAGES, round(tokens), texts, PASSAGES, round(ASSUMED["gpus"]), MAX_UNIT_PASSAGES["gpu"], None)
    config = make_config("s3://nowhere/root", "s3://nowhere/corpus")
    found["bytes"] = sizes(config, plan, ahead, DIM)
    found["memory_bytes"] = {
        "anti-join, of keys": round(join["bytes_per_key"] * anti_join.KEYS_AT_ONCE),
        "anti-join, a byte per passage": PASSAGES,
        "live keys in one task": KEY_BYTES * PASSAGES,
        "training sample": 4 * DIM * plan.train_vectors,
        "merge, a passage": PASSAGE_BYTES,
        "merge, passages": PASSAGE_BYTES * PASSAGES,
    }
    found["files"] = files(config, plan)
    found["hours"] = hours(measured, plan, found["bytes"], join)
    found["requests"] = requests(measured["scale"])
    found["usd"] = {
        "encoding": round(found["encode"]["gpu_hours"] * ASSUMED["usd_per_gpu_hour"]),
        "requests": round(sum(found["requests"][kind] * ASSUMED[f"usd_per_1000_{kind}s"] / 1000 for kind in ("put", "get")), 2),
        "storage, a month": round(
            (found["bytes"]["embedding_bytes"] + found["bytes"]["artifact_bytes"]) / 1e9 * ASSUMED["usd_per_gb_month"]
        ),
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def encode(simulated: dict[str, Any]) -> dict[str, float]:
    tokens = PASSAGES * ASSUMED["tokens_per_passage"]
    gpu_hours = tokens / ASSUMED["tokens_per_s_per_gpu"] / 3600
    core = simulated["tokenizer"]["tokens_per_s_per_core"]
    many = max(simulated["actors"], key=lambda run: (int(run["actors"]), int(run["unit_s"])))
    return {
        "gpu_hours": round(gpu_hours, 1),
        "efficiency": many["efficiency"],
        "hours": round(gpu_hours / ASSUMED["gpus"] / many["efficiency"], 2),
        "tokenizer_cores": round(ASSUMED["gpus"] * ASSUMED["tokens_per_s_per_gpu"] / core, 1),
    }


def shards() -> int:
    """Embedding shards, as large as a GPU makes them."""
    return -(-PASSAGES // MAX_UNIT_PASSAGES["gpu"])


def files(config: Config, plan: Any) -> dict[str, int]:
    """What there is to open, with the default of ``compute.merge_memory``."""
    entry_bytes, trained_bytes = code_bytes(plan.kind, DIM, plan.m, plan.nbits) + ID_BYTES, 4 * DIM * plan.nlist
    return {
        "embedding shards": shards(),
        "index files": len(part_sizes(config, PASSAGES, entry_bytes, trained_bytes)),
        "document files": -(-PASSAGES // FILE_ROWS),
    }


def hours(measured: dict[str, Any], plan: Any, size: dict[str, int], join: dict[str, Any]) -> dict[str, float]:
    """Training and adding scaled by vectors, dimensions and the square root of lists; the merge by bytes."""
    growth = measured["index"]["growth"]["static"]["rows"][-1]
    cores, dim = 2, 256
    lists = (plan.nlist / growth["nlist"]) ** 0.5 * DIM / dim
    sample = choose(IndexConfig(kind=plan.kind), growth["vectors"], dim).train_vectors
    workers = ASSUMED["gpus"] * ASSUMED["cores_beside_each_gpu"]
    add = growth["add_s"] * cores * PASSAGES / growth["vectors"] * lists / 3600
    merged = measured["merge"]["default settings"]
    texts = max(measured["scale"]["runs"], key=lambda run: int(run["documents"]))  # the same corpus
    row_bytes = 2 * dim + merged["build"]["index_bytes"] / merged["build"]["passages"]
    row_bytes += texts["corpus_bytes"] / texts["documents"]
    rate = merged["build"]["passages"] * row_bytes / merged["merge"]["default"]["seconds"]
    return {
        "anti-join": round(2 * PASSAGES / join["keys_per_s"] / 3600, 2),
        "training, core hours": round(growth["train_s"] * cores * plan.train_vectors / sample * lists / 3600, 1),
        "adding, core hours": round(add, 1),
        "adding": round(add / workers, 2),
        "merge, bytes per second": round(rate),
        "merge": round(size["artifact_bytes"] / rate / 3600, 1),
    }


def requests(scale: dict[str, Any]) -> dict[str, float]:
    """Requests by what an embedding shard adds to them, from two measured sizes."""
    few, many = scale["requests"]
    more = {kind: many["first"].get(kind, 0) - few["first"].get(kind, 0) for kind in ("PUT", "GET", "HEAD")}
    each = {kind: count / (many["shards"] - few["shards"]) for kind, count in more.items()}
    return {
        "per shard": round(sum(each.values()), 1),
        "put": round(each["PUT"] * shards()),
        "get": round((each["GET"] + each["HEAD"]) * shards()),
    }


def measure_join() -> dict[str, Any]:
    """An anti-join of keys in files: the time of a key in ranges, the memory of one that is joined at once."""
    rng = np.random.default_rng(1)
    every = np.sort(np.frombuffer(rng.bytes(KEY_BYTES * JOINED * 3 // 2), dtype=KEY_DTYPE))
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(folder)

        def put(where: str, keys: Any, number: int) -> DataFile:
            data = parquet_bytes(pa.table({"key": fixed_binary(keys)}), compress=False)
            storage.create(f"{where}/{number}.parquet", data)
            return DataFile(name=f"{number}.parquet", rows=len(keys), size_bytes=len(data), sha256="0")

        parts, records = [], []
        for number in range(FILES):
            parts.append(Part(put(layout.PASSAGES, every[:JOINED][number::FILES], number), np.empty(0, dtype=np.int64)))
            records.append(Record(unit=str(number), files=(put("e", every[-JOINED:][number::FILES], number),)))
        where, at_once = (storage, parts, storage, "e", records), 2 * JOINED // RANGES
        started = time.perf_counter()
        missing = anti_join.missing_passages(*where, keys_at_once=at_once)
        seconds = time.perf_counter() - started
        tracemalloc.start()
        anti_join.missing_passages(*where, keys_at_once=2 * JOINED)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert sum(int(mask.sum()) for mask in missing) == JOINED // 2
    return {
        "keys": 2 * JOINED, "files": 2 * FILES, "ranges": RANGES, "seconds": round(seconds, 2),
        "keys_per_s": round(2 * JOINED / seconds), "bytes_per_key": round(peak / (2 * JOINED), 1),
    }  # fmt: skip


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
