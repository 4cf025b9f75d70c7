"""Measures the encoder against sentence-transformers and the other CPU engines; writes encoder.json.

About 20 minutes; ``--only stage`` measures one part again.

Texts: 20,000 windows of the standard library's docstrings, 5 to 500 tokens, log-uniform, cut at the model's 256.
Points 1 to 5 run on slices of them, all contenders in turn in every round; medians, with the cosine to FP32 beside.
The engines onnxruntime and nncf are not dependencies of vecmill: ``pip install '.[bench]'``; without them their rows
are left out and the script says so. Queries are XQuAD's English questions, without ../shared the demo's.
"""

import gzip
import json
import math
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HOME = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HOME))

import numpy as np
import torch

from jobs.demo import QUERIES
from jobs.demo_corpus import docstrings
from pipeline.encoder import Encoder, load_query_encoder
from pipeline.encoding.batching import pad
from pipeline.encoding.encoder_bench import interleave, query_latency
from pipeline.encoding.model import find_model, resolve_spec
from pipeline.encoding.numerics import resolve_backend, resolve_here
from pipeline.encoding.torch_engine import TorchEngine, load_plain, matmul_rate
from tests.benchmarks.machine import machine
from tests.conftest import MINILM, SHARED_DATA, write_jsonl

QUICK = "--quick" in sys.argv
TEXTS = 2000 if QUICK else 20_000
SLICE = 60 if QUICK else 1000
ROUNDS = 1 if QUICK else 3
POOL_ROUNDS = 1 if QUICK else 3
BATCHES = (4, 8, 16, 32)
WORDS_PER_TOKEN = 1.9


def main() -> None:
    file = Path(__file__).with_suffix(".json")
    known = json.loads(file.read_text()) if file.is_file() and not QUICK else {}
    parts = {
        "texts": corpus_facts,
        "stage": stage,
        "engines": engines,
        "pool": pool,
        "query": lambda: json.loads(child("query")),
    }
    for name in [sys.argv[sys.argv.index("--only") + 1]] if "--only" in sys.argv else parts:
        known[name] = {"measured": machine(), **parts[name]()}
        print(json.dumps({name: known[name]}, indent=1))
    if not QUICK:
        file.write_text(json.dumps(known, indent=1) + "\n")


def texts(count: int, seed: int = 0) -> list[str]:
    """Windows of running text at random places."""
    words = " ".join(row["text"] for row in docstrings()).split()
    chance = random.Random(seed)
    found = []
    for _ in range(count):
        tokens = math.exp(chance.uniform(math.log(5), math.log(500)))
        size = max(1, round(tokens / WORDS_PER_TOKEN))
        first = chance.randrange(len(words) - size)
        found.append(" ".join(words[first : first + size]))
    return found


def here(precision: str = "auto") -> Any:
    precision = resolve_here(precision)
    folder = find_model(MINILM)
    return resolve_spec(
        model=MINILM, precision=precision, backend=resolve_backend("auto", folder, on_gpu=False, precision=precision)
    )[0]


def corpus_facts() -> dict[str, Any]:
    encoder = Encoder(here())
    lengths = [len(ids) for ids in encoder.tokenizer(texts(TEXTS))]
    return {"texts": TEXTS, "tokens": sum(lengths), "mean_tokens": round(float(np.mean(lengths)), 1)}


def engines() -> dict[str, Any]:
    """Points 1, 3, 4 and 5: every engine on the same slice, in turn."""
    some = texts(SLICE, seed=1)
    spec, folder = resolve_spec(model=MINILM)
    ours = {name: Encoder(here(name)) for name in ("bf16", "int8", "fp32")}
    on_torch = Encoder(resolve_spec(model=MINILM, precision=resolve_here("auto"))[0])
    plain, plain_bf16 = load_plain(spec, folder, "fp32"), load_plain(spec, folder, "bf16")
    few = some[: SLICE // 3]
    trial, _ = interleave({str(size): lambda size=size: plain_bf16.encode(few, batch_size=size) for size in BATCHES}, 2)
    best = int(min(trial, key=lambda size: trial[size]))
    contenders: dict[str, Callable[[], Any]] = {
        "vecmill bf16": lambda: ours["bf16"].encode_documents(some),
        "sentence-transformers fp32": lambda: plain.encode(some),
        "sentence-transformers bf16": lambda: plain_bf16.encode(some, batch_size=best),
        "vecmill fp32": lambda: ours["fp32"].encode_documents(some),
        "vecmill int8": lambda: ours["int8"].encode_documents(some),
        "vecmill bf16 on torch": lambda: on_torch.encode_documents(some),
    }
    for name, engine in shelf(spec, folder, ours["fp32"].tokenizer(texts(300, seed=2))).items():
        contenders[name] = lambda engine=engine: fixed_batches(engine, ours["fp32"].tokenizer(some))
    for run in contenders.values():  # warm
        run()
    peak_before = matmul_rate("bf16")
    seconds, vectors = interleave(contenders, ROUNDS)
    peak = max(peak_before, matmul_rate("bf16"))
    tokens = sum(len(ids) for ids in ours["fp32"].tokenizer(some))
    reference = unit(vectors["sentence-transformers fp32"])
    rows = {}
    for name, value in seconds.items():
        cosine = (unit(vectors[name]) * reference).sum(axis=1)
        rows[name] = {
            "tokens_per_s": round(tokens / value),
            "cosine_mean": round(float(cosine.mean()), 6),
            "cosine_min": round(float(cosine.min()), 6),
        }
    rate = rows["vecmill bf16"]["tokens_per_s"] * ours["bf16"].flops_per_token
    shelf_best = max(
        (name for name in rows if name.startswith(("onnx", "openvino"))), key=lambda name: rows[name]["tokens_per_s"]
    )
    return {
        "rows": rows,
        "best_batch_of_sentence_transformers_bf16": best,
        "ratio_to_st_defaults": round(seconds["sentence-transformers fp32"] / seconds["vecmill bf16"], 2),
        "ratio_to_st_bf16": round(seconds["sentence-transformers bf16"] / seconds["vecmill bf16"], 2),
        "ratio_fp32_to_st_fp32": round(seconds["sentence-transformers fp32"] / seconds["vecmill fp32"], 2),
        "ratio_int8_to_bf16": round(seconds["vecmill bf16"] / seconds["vecmill int8"], 2),
        "fastest_off_the_shelf": shelf_best,
        "ratio_bf16_to_fastest_off_the_shelf": round(seconds[shelf_best] / seconds["vecmill bf16"], 2),
        "ratio_int8_to_fastest_off_the_shelf": round(seconds[shelf_best] / seconds["vecmill int8"], 2),
        "matmul_bf16_gflops": round(peak / 1e9),
        "matmul_fp32_gflops": round(matmul_rate("fp32") / 1e9),
        "mfu_bf16": round(rate / peak, 3),
        "ceiling_bf16_tokens_per_s": round(peak / ours["bf16"].flops_per_token),
    }


def shelf(spec: Any, folder: Any, calibration: list[list[int]]) -> dict[str, Callable[[Any, Any], Any]]:
    """The other CPU engines, as their manuals set them up: whole machine, latency of one batch."""
    import openvino
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    warnings.simplefilter("ignore")
    module, example = TorchEngine(spec, folder).as_function(calibration[:2], int8=False)
    frontend = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchScriptPythonDecoder(module, example_input=example)
    model = frontend.convert(frontend.load(decoder))
    core = openvino.Core()

    def compiled(model: Any, precision: str) -> Callable[[Any, Any], Any]:
        request = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision}).create_infer_request()
        return lambda ids, mask: next(iter(request.infer([ids, mask]).values())).copy()

    found = {"openvino bf16": compiled(model, "bf16"), "openvino fp32": compiled(model, "f32")}
    try:
        import nncf

        data = nncf.Dataset([list(pad([ids], 0)) for ids in calibration])
        quantized = nncf.quantize(
            model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(calibration), fast_bias_correction=True
        )
        found["openvino int8 (nncf)"] = compiled(quantized, "bf16")
    except ImportError as error:
        print(f"nncf is not here, its row is left out: {error}", file=sys.stderr)
    try:
        found |= onnx_engines(module, example)
    except ImportError as error:
        print(f"onnxruntime is not here, its rows are left out: {error}", file=sys.stderr)
    return found


def onnx_engines(module: Any, example: Any) -> dict[str, Callable[[Any, Any], Any]]:
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    found: dict[str, Callable[[Any, Any], Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {"onnxruntime fp32": f"{folder}/m.onnx", "onnxruntime int8": f"{folder}/m8.onnx"}
        axes = {"ids": {0: "rows", 1: "width"}, "mask": {0: "rows", 1: "width"}}
        with torch.inference_mode():
            torch.onnx.export(
                module,
                example,
                files["onnxruntime fp32"],
                input_names=["ids", "mask"],
                output_names=["vectors"],
                dynamic_axes=axes,
                dynamo=False,
                opset_version=17,
            )
        quantize_dynamic(files["onnxruntime fp32"], files["onnxruntime int8"], weight_type=QuantType.QInt8)
        for name, file in files.items():
            session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
            found[name] = lambda ids, mask, session=session: session.run(None, {"ids": ids, "mask": mask})[0]
    return found


def fixed_batches(engine: Callable[[Any, Any], Any], tokens: list[list[int]], size: int = 16) -> Any:
    """As sentence-transformers feeds an engine: sorted by length, batches of a fixed number of texts."""
    order = sorted(range(len(tokens)), key=lambda row: -len(tokens[row]))
    vectors = np.empty((len(tokens), 384), dtype=np.float32)
    for first in range(0, len(order), size):
        rows = order[first : first + size]
        vectors[rows] = engine(*pad([tokens[row] for row in rows], 0))
    return vectors


def unit(vectors: Any) -> Any:
    vectors = np.asarray(vectors, dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def pool() -> dict[str, Any]:
    """Point 2: the device-list pool of sentence-transformers, in processes of their own, memory as the sum of peaks."""
    found: dict[str, list[dict[str, float]]] = {"ours": [], "pool": [], "pool_bf16": []}
    for _ in range(POOL_ROUNDS):
        for name in found:
            found[name].append(json.loads(child(name)))
    medians = {name: {key: float(np.median([run[key] for run in runs])) for key in runs[0]} for name, runs in found.items()}
    return {
        **medians,
        "ratio": round(medians["pool"]["seconds"] / medians["ours"]["seconds"], 2),
        "ratio_to_pool_bf16": round(medians["pool_bf16"]["seconds"] / medians["ours"]["seconds"], 2),
        "memory_share": round(medians["ours"]["peak_mb"] / medians["pool"]["peak_mb"], 2),
    }


def child(name: str) -> str:
    command = [sys.executable, __file__, "--child", name, *(["--quick"] if QUICK else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


def run_child(name: str) -> None:
    if name == "query":
        os.sched_setaffinity(0, {0})
        torch.set_num_threads(1)
        questions = real_questions()
        load_query_encoder(here(), threads=1)  # traces the model, unless this machine has before
        started = time.perf_counter()
        encoder = load_query_encoder(here(), threads=1)
        load_s = time.perf_counter() - started
        p50, p99 = query_latency(encoder, questions)
        lengths = [len(ids) for ids in encoder.tokenizer(questions)]
        rows = {"p50_ms": round(p50, 2), "p99_ms": round(p99, 2), "load_s": round(load_s, 2), "backend": encoder.spec.backend}
        facts = {"queries": len(questions), "mean_tokens": round(float(np.mean(lengths)), 1), "max_tokens": max(lengths)}
        print(json.dumps(rows | facts))
        return
    some = texts(SLICE, seed=1)
    if name == "ours":
        encoder = Encoder(here())
        run = encoder.encode_documents
    else:
        plain = load_plain(*resolve_spec(model=MINILM), "bf16" if name == "pool_bf16" else "fp32")
        workers = plain.start_multi_process_pool(["cpu"] * (os.cpu_count() or 2))
        run = partial(plain.encode, pool=workers)
    run(some[: SLICE // 10])
    started = time.perf_counter()
    run(some)
    seconds = time.perf_counter() - started
    processes = [os.getpid(), *(process.pid for process in multiprocessing.active_children())]
    print(json.dumps({"seconds": seconds, "peak_mb": sum(peak_mb(process) for process in processes)}))
    if name != "ours":
        plain.stop_multi_process_pool(workers)
    sys.stdout.flush()


def peak_mb(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024


def real_questions() -> list[str]:
    file = SHARED_DATA / "xquad" / "queries.jsonl.gz"
    if not file.is_file():
        print("XQuAD is not here: the demo's queries are timed", file=sys.stderr)
        return list(QUERIES) * 40
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [row["text"] for row in rows if "en" in row["_id"].split("-")][:500]


def stage() -> dict[str, Any]:
    """Point 6: the embed stage under Ray Data against the bare loop on the same texts, A B A; start-up apart.

    The stage is ``vecmill embed``, timed from the record of its first unit, when the actor is warm, to that of its last.
    Start-up is all before that but the ingest unit's own seconds and the encoding of the first unit; on the first run
    of a machine it holds the tracing of the model, measured on a small corpus with an empty cache.
    """
    all_texts = texts(TEXTS)
    encoder = Encoder(here())

    def bare() -> float:
        started = time.perf_counter()
        encoded = encoder.encode_tokens(encoder.tokenizer(all_texts))
        return encoded.tokens / (time.perf_counter() - started)

    with tempfile.TemporaryDirectory(prefix="vmbench") as folder:
        first = run_embed(Path(folder) / "first", all_texts[:SLICE], XDG_CACHE_HOME=f"{folder}/cache")
        rates = [bare()]
        run = run_embed(Path(folder) / "all", all_texts)
        rates.append(bare())
    records, moments = run["records"], run["moments"]
    tokens = sum(record.counts["tokens"] for record in records)
    warm_s = moments[-1] - moments[0]
    stage_rate = (tokens - records[0].counts["tokens"]) / warm_s
    return {
        "tokens": tokens,
        "units": len(records),
        "bare_tokens_per_s": [round(rate) for rate in rates],
        "stage_tokens_per_s": round(stage_rate),
        "ratio": round(float(np.mean(rates)) / stage_rate, 3),
        "warm_s": round(warm_s, 1),
        "startup_s": round(run["startup_s"], 1),
        "startup_first_run_s": round(first["startup_s"], 1),
        "ingest_s": round(run["ingest_s"], 1),
        "wall_s": round(run["wall_s"], 1),
        "timings_s": {name: round(sum(record.timings_s[name] for record in records), 1) for name in records[0].timings_s},
        "mfu": round(float(np.mean([record.rates["mfu"] for record in records])), 3),
        "batch_tokens": records[0].counts["batch_tokens"],
    }


def run_embed(home: Path, some: list[str], **environment: str) -> dict[str, Any]:
    """``vecmill embed`` of texts in a new folder: its records in the order they were written, and when."""
    from pipeline.root.manifest import Record

    home.mkdir()
    write_jsonl(home / "corpus.jsonl", ({"id": str(n), "text": text} for n, text in enumerate(some)))
    (home / "config.yaml").write_text(
        f"root: {home}/root\ncorpus: {{uri: {home}/corpus.jsonl}}\npassages: {{long: truncate}}\n"
    )
    started = time.time()
    command = [sys.executable, "-m", "jobs", "embed", "-c", str(home / "config.yaml"), "-q"]
    subprocess.run(command, cwd=HOME, check=True, env=os.environ | environment)
    wall_s = time.time() - started
    ingested = [Record.model_validate_json(file.read_bytes()) for file in home.glob("root/passages/*.json")]
    files = sorted(home.rglob("root/embeddings/*/*.json"), key=lambda file: file.stat().st_mtime)
    records = [Record.model_validate_json(file.read_bytes()) for file in files]
    moments = [file.stat().st_mtime for file in files]
    ingest_s = sum(record.timings_s["total"] for record in ingested)
    first_unit_s = records[0].timings_s["encode"] + records[0].timings_s["write"]
    startup_s = moments[0] - started - ingest_s - first_unit_s
    return {"records": records, "moments": moments, "wall_s": wall_s, "ingest_s": ingest_s, "startup_s": startup_s}


if __name__ == "__main__":
    if "--child" in sys.argv:
        run_child(sys.argv[sys.argv.index("--child") + 1])
    else:
        main()
