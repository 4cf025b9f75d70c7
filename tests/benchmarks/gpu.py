"""Measures the encoder on a GPU; writes gpu.json. Minutes; needs torch and sentence-transformers, neither Ray nor FAISS.

``python tests/benchmarks/gpu.py OUT [MODEL TEXTS]``: models of well-known shapes with random weights on random words, and a
real MODEL on the texts of curve.py's PACK (``PACK/model PACK/texts.json.gz``). Against SentenceTransformer.encode with FP32
defaults and with 16-bit weights at its best batch size, in turn, tokenizing included. Beside it the rate with texts tokenized
ahead, which is how the pipeline feeds an encoder, and what one core tokenizes: how many cores a GPU needs.
"""

import gzip
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HOME = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HOME))

from pipeline.calibration import calibrate
from pipeline.encoder import Encoder
from pipeline.encoder_bench import interleave, measure, synthetic_texts
from pipeline.model import EncoderSpec, resolve_spec
from tests.benchmarks.machine import machine
from tests.gpu.random_models import write_model

TEXTS = {"minilm-l6": 20_000, "bge-base": 10_000, "bge-large": 5_000}
ONE_CORE_TEXTS = 1000
ROUNDS = 3


def main() -> None:
    out = Path(sys.argv[1]).absolute()
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"measured": machine(), "models": {}}
    with tempfile.TemporaryDirectory() as folder:
        if len(sys.argv) > 2:
            spec = resolve_spec(model=sys.argv[2], precision="fp16")[0]
            texts = list(json.loads(gzip.decompress(Path(sys.argv[3]).read_bytes())).values())
            _add(found, out, "all-MiniLM-L6-v2", spec, texts)
        for shape, count in TEXTS.items():
            spec = resolve_spec(model=str(write_model(shape, Path(folder) / shape)), precision="fp16")[0]
            _add(found, out, shape, spec, synthetic_texts(Encoder(spec).tokenizer, count))


def _add(found: dict[str, Any], out: Path, name: str, spec: EncoderSpec, texts: Sequence[str]) -> None:
    """One more row, written at once: a GPU is lent for minutes."""
    started = time.perf_counter()
    row = asdict(measure(spec, texts, rounds=ROUNDS, baseline=True)) | ahead(spec, texts)
    found["models"][name] = row | {"model": name, "measured_in_s": round(time.perf_counter() - started, 1)}
    (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    print(name, json.dumps(row, indent=1), flush=True)


def ahead(spec: EncoderSpec, texts: Sequence[str]) -> dict[str, Any]:
    """Tokens per second of the GPU alone and of one tokenizing core."""
    encoder = Encoder(spec)
    calibrate(encoder)
    tokens = encoder.tokenizer(texts)
    encoder.encode_tokens(tokens)
    seconds, _ = interleave({"ahead": lambda: encoder.encode_tokens(tokens)}, ROUNDS)
    rate = sum(map(len, tokens)) / seconds["ahead"]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    few = list(texts[:ONE_CORE_TEXTS])
    seconds, _ = interleave({"one": lambda: encoder.tokenizer(few)}, ROUNDS)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    core = sum(map(len, tokens[:ONE_CORE_TEXTS])) / seconds["one"]
    mfu = rate * encoder.flops_per_token / encoder.matmul_rate()
    return {
        "ahead_tokens_per_s": round(rate), "ahead_mfu": round(mfu, 3),
        "core_tokens_per_s": round(core), "cores_per_gpu": round(rate / core, 1),
    }  # fmt: skip


if __name__ == "__main__":
    main()
