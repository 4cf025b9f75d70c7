"""Measures the encoder on a GPU; writes gpu.json. Minutes; needs torch and sentence-transformers, neither Ray nor FAISS.

``python tests/benchmarks/gpu.py OUT PACK``: MiniLM on SciFact, both from the PACK of curve.py, then a model of a well-known
shape with random weights on random words; of OUT/gpu.json, what is there already is not measured again. Against
SentenceTransformer.encode with FP32 defaults and with 16-bit weights at its best batch size, in turn, tokenizing included.
Beside it the rate with texts tokenized ahead, which is how the pipeline feeds an encoder: as it is, with padding, and with
padding and cuDNN's attention, which torch picks by itself; and what one core tokenizes: how many cores a GPU needs. Each of
these rounds has other texts, so batches of other shapes, as each unit of a corpus has.
"""

import gzip
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HOME = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HOME))

from pipeline.encoder import Encoder
from pipeline.encoding.calibration import calibrate
from pipeline.encoding.encoder_bench import interleave, measure, synthetic_texts
from pipeline.encoding.model import EncoderSpec, find_model, resolve_spec
from pipeline.encoding.tokenizer import TextTokenizer
from pipeline.encoding.torch_engine import TorchEngine
from tests.benchmarks.machine import machine
from tests.gpu.random_models import write_model

TEXTS = {"bge-base": 2500}
AHEAD_TEXTS = 20_000
ONE_CORE_TEXTS = 1000
ROUNDS = 3
ROUND_SHARE = 0.9


def main() -> None:
    out = Path(sys.argv[1]).absolute()
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "gpu.json"
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {"models": {}}
    with tempfile.TemporaryDirectory() as folder:
        if "all-MiniLM-L6-v2" not in found["models"]:
            spec = resolve_spec(model=f"{sys.argv[2]}/model", precision="fp16")[0]
            texts = json.loads(gzip.decompress(Path(sys.argv[2], "scifact", "texts.json.gz").read_bytes()))
            _add(found, out, "all-MiniLM-L6-v2", spec, list(texts.values()), list(texts.values()))
        for shape in (name for name in TEXTS if name not in found["models"]):
            spec = resolve_spec(model=str(write_model(shape, Path(folder) / shape)), precision="fp16")[0]
            words = synthetic_texts(TextTokenizer(find_model(spec.model), spec.max_tokens), AHEAD_TEXTS)
            _add(found, out, shape, spec, words[: TEXTS[shape]], words)


def _add(found: dict[str, Any], out: Path, name: str, spec: EncoderSpec, texts: Sequence[str], more: Sequence[str]) -> None:
    """One more row, written at once: a GPU is lent for minutes. ``more``: the texts that are tokenized ahead."""
    started = time.perf_counter()
    row = asdict(measure(spec, texts, rounds=ROUNDS, baseline=True)) | ahead(spec, more)
    found["models"][name] = (
        {"measured": machine()} | row | {"model": name, "measured_in_s": round(time.perf_counter() - started, 1)}
    )
    (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    print(name, json.dumps(row, indent=1), flush=True)


def ahead(spec: EncoderSpec, texts: Sequence[str]) -> dict[str, Any]:
    """Tokens per second of the GPU alone and of one tokenizing core."""
    encoder = Encoder(spec)
    calibrate(encoder)
    engine = cast(TorchEngine, encoder._engine)
    tokens = encoder.tokenizer(texts)
    packs, random = engine._packs, np.random.default_rng(0)
    rates: dict[str, list[float]] = {"ahead": [], "padded": [], "cudnn": []}
    encoder.encode_tokens(tokens[: len(tokens) // 4])
    for _ in range(ROUNDS):
        for name, found in rates.items():
            engine._packs = packs and name == "ahead"
            torch.backends.cuda.enable_cudnn_sdp(name == "cudnn")
            chosen = random.permutation(len(tokens))[: int(ROUND_SHARE * len(tokens))]
            started = time.perf_counter()
            encoded = encoder.encode_tokens([tokens[row] for row in chosen])
            found.append(encoded.tokens / (time.perf_counter() - started))
    torch.backends.cuda.enable_cudnn_sdp(False)
    engine._packs = packs
    rate = statistics.median(rates["ahead"])
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    few = list(texts[:ONE_CORE_TEXTS])
    seconds, _ = interleave({"one": lambda: encoder.tokenizer(few)}, ROUNDS)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    core = sum(map(len, tokens[:ONE_CORE_TEXTS])) / seconds["one"]
    mfu = rate * encoder.flops_per_token / encoder.matmul_rate()
    return {
        "packs": packs, "ahead_batch_tokens": encoder.batch_tokens,
        **{f"{name}_tokens_per_s": round(statistics.median(found)) for name, found in rates.items()},
        "ahead_mfu": round(mfu, 3), "core_tokens_per_s": round(core), "cores_per_gpu": round(rate / core, 1),
    }  # fmt: skip


if __name__ == "__main__":
    main()
