"""How fast an encoder is here, against what the machine can do and against sentence-transformers at its best."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from pipeline.encoder import Encoder, load_query_encoder
from pipeline.encoding.batching import Vectors
from pipeline.encoding.calibration import calibrate
from pipeline.encoding.model import EncoderSpec, find_model, resolve_spec
from pipeline.encoding.numerics import on_gpu, resolve_backend, resolve_here
from pipeline.encoding.tokenizer import TextTokenizer
from pipeline.encoding.torch_engine import device_name, load_plain, plainly
from pipeline.errors import ConfigError, VecmillError

SHORTEST_TOKENS, LONGEST_TOKENS = 5, 500
EXACT_TEXTS = 64
QUERIES = 200
BASELINE_BATCHES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class EncoderReport:
    """Rates are tokens (real ones, without padding) per second, medians over rounds; times in seconds or milliseconds."""

    model: str
    device: str
    precision: str
    backend: str
    batch_tokens: int
    texts: int
    tokens: int
    padding: float
    load_s: float
    tokens_per_s: float
    matmul_gflops: float
    mfu: float | None
    cosine_mean: float
    cosine_min: float
    query_p50_ms: float
    query_p99_ms: float
    baseline: dict[str, Any] | None


def measure(spec: EncoderSpec, texts: Sequence[str], *, rounds: int = 3, baseline: bool = False) -> EncoderReport:
    """Load, calibrate and time an encoder on ``texts``; the cosine is to FP32.

    ``baseline``: also ``SentenceTransformer.encode`` in the same or the nearest precision it has, with the best of
    several batch sizes, in turn with ours.
    """
    started = time.perf_counter()
    encoder = Encoder(spec)
    calibrate(encoder)
    load_s = time.perf_counter() - started
    texts = [spec.document_prompt + text for text in texts]
    encoded = encoder.encode_tokens(encoder.tokenizer(texts[: len(texts) // 4]), prompt=spec.document_prompt)
    contenders: dict[str, Callable[[], Any]] = {"ours": lambda: encoder.encode_tokens(encoder.tokenizer(texts))}
    if baseline:
        contenders |= _baselines(spec, texts)
    seconds, results = interleave(contenders, rounds)
    encoded = results["ours"]
    rate = encoded.tokens / seconds["ours"]
    peak = encoder.matmul_rate()
    some = list(range(0, len(texts), -(-len(texts) // EXACT_TEXTS)))
    exact_tokens = encoder.tokenizer([texts[row] for row in some])
    cosine = encoder.cosine_to_exact(exact_tokens, encoded.vectors[some])
    p50, p99 = query_latency(load_query_encoder(spec), _queries(texts))
    return EncoderReport(
        model=spec.model,
        device=device_name(),
        precision=spec.precision,
        backend=spec.backend,
        batch_tokens=encoder.batch_tokens,
        texts=len(texts),
        tokens=encoded.tokens,
        padding=round(encoded.padded_tokens / encoded.tokens - 1, 4),
        load_s=round(load_s, 2),
        tokens_per_s=round(rate),
        matmul_gflops=round(peak / 1e9),
        mfu=round(rate * encoder.flops_per_token / peak, 3) if encoder.flops_per_token else None,
        cosine_mean=float(cosine.mean()),
        cosine_min=float(cosine.min()),
        query_p50_ms=round(p50, 2),
        query_p99_ms=round(p99, 2),
        baseline=_compare(seconds, results, encoded.tokens, encoded.vectors) if baseline else None,
    )


def interleave(contenders: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds of each over ``rounds`` in which all run in turn, and what each returned last."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    results = {}
    for _ in range(rounds):
        for name, run in contenders.items():
            started = time.perf_counter()
            results[name] = run()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in times.items()}, results


def query_latency(encoder: Encoder, queries: Sequence[str]) -> tuple[float, float]:
    """Median and 99th percentile of tokenizing and encoding one query at a time, ms."""
    for query in queries[:20]:
        encoder.encode_queries([query])
    times = []
    for query in queries:
        started = time.perf_counter()
        encoder.encode_queries([query])
        times.append(1000 * (time.perf_counter() - started))
    return float(np.percentile(times, 50)), float(np.percentile(times, 99))


def synthetic_texts(tokenizer: TextTokenizer, count: int, seed: int = 0) -> list[str]:
    """Texts of random words of the vocabulary, about 5 to 500 tokens each, log-uniform: for machines without a corpus."""
    random = np.random.default_rng(seed)
    words = np.array(tokenizer.words())
    lengths = np.exp(random.uniform(np.log(SHORTEST_TOKENS), np.log(LONGEST_TOKENS), count)).astype(int)
    return [" ".join(random.choice(words, length)) for length in lengths]


def _queries(texts: Sequence[str]) -> list[str]:
    """The first 4 to 12 words of texts."""
    return [" ".join(text.split()[: 4 + number % 9]) for number, text in enumerate(texts[:QUERIES])]


def _baselines(spec: EncoderSpec, texts: Sequence[str]) -> dict[str, Callable[[], Vectors]]:
    folder = find_model(spec.model, spec.revision)
    precision = "bf16" if spec.precision == "int8" else spec.precision
    default, best = load_plain(spec, folder, "fp32"), load_plain(spec, folder, precision)
    for model in (default, best):
        plainly(model, texts[: len(texts) // 4])  # warm, as ours is
    batches = {f"sentence-transformers {precision}, batch {size}": size for size in BASELINE_BATCHES}
    found = {name: partial(plainly, best, texts, batch_size=size) for name, size in batches.items()}
    return {"sentence-transformers fp32, defaults": partial(plainly, default, texts), **found}


def _compare(seconds: dict[str, float], results: dict[str, Any], tokens: int, ours: Vectors) -> dict[str, Any]:
    best = min((name for name in seconds if "batch" in name), key=lambda name: seconds[name])
    reference = _unit(results["sentence-transformers fp32, defaults"])
    found = {}
    for name in ("sentence-transformers fp32, defaults", best):
        cosine = (_unit(results[name]) * reference).sum(axis=1)
        found[name] = {
            "tokens_per_s": round(tokens / seconds[name]),
            "ratio": round(seconds[name] / seconds["ours"], 2),
            "cosine_mean": float(cosine.mean()),
            "cosine_min": float(cosine.min()),
        }
    cosine = (ours * reference).sum(axis=1)
    return {**found, "ours": {"cosine_mean": float(cosine.mean()), "cosine_min": float(cosine.min())}}


def _unit(vectors: Any) -> Vectors:
    found = np.asarray(vectors, dtype=np.float32)
    return cast(Vectors, found / np.linalg.norm(found, axis=1, keepdims=True))


def main() -> None:
    """``python -m pipeline.encoder bench``."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.encoder", description=__doc__)
    bench = parser.add_subparsers(required=True).add_parser("bench", help="time an encoder on this machine")
    bench.add_argument("--model", required=True, help="folder, package:<import name>/<folder>, or hub id with --revision")
    bench.add_argument("--revision")
    bench.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16", "int8"))
    bench.add_argument("--backend", default="auto", choices=("auto", "torch", "openvino"))
    bench.add_argument("--texts", type=Path, help="file with one text per line; default: random words of the vocabulary")
    bench.add_argument("--count", type=int, default=20_000 if on_gpu() else 2000, help="number of texts")
    bench.add_argument("--rounds", type=int, default=3)
    bench.add_argument("--baseline", action="store_true", help="also time SentenceTransformer.encode at its best")
    bench.add_argument("--json", action="store_true")
    options = parser.parse_args()
    try:
        report = asdict(_measure(options)) | {"cores": os.cpu_count(), "python": platform.python_version()}
    except VecmillError as error:
        raise SystemExit(f"bench: {error}") from error
    text = json.dumps(report, indent=1) if options.json else "\n".join(f"{name:>15}  {report[name]}" for name in report)
    print(text)  # noqa: T201 - the result


def _measure(options: argparse.Namespace) -> EncoderReport:
    folder = find_model(options.model, options.revision)
    precision = resolve_here(options.precision, overflows=folder.overflows)
    backend = resolve_backend(options.backend, folder, on_gpu=on_gpu(), precision=precision)
    spec, _ = resolve_spec(model=options.model, revision=options.revision, precision=precision, backend=backend)
    if options.texts and not options.texts.is_file():
        raise ConfigError(f"--texts: {options.texts}: no such file")
    lines = options.texts.read_text(encoding="utf-8").splitlines() if options.texts else []
    texts = [line for line in lines if line.strip()][: options.count]
    texts = texts or synthetic_texts(TextTokenizer(folder, spec.max_tokens), options.count)
    return measure(spec, texts, rounds=options.rounds, baseline=options.baseline)
