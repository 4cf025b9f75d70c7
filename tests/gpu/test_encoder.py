"""What only a GPU can show; skipped without one. ``python -m pytest tests/gpu``."""

import numpy as np
import pytest
import torch

from pipeline.calibration import BUDGETS
from pipeline.encoder import Encoder
from pipeline.encoder_bench import measure, synthetic_texts
from pipeline.model import resolve_spec
from pipeline.torch_engine import load_plain
from tests.gpu.random_models import write_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_model("minilm-l6", tmp_path_factory.mktemp("models") / "minilm"))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_vectors_are_those_of_fp32(model, precision):
    spec, folder = resolve_spec(model=model, precision=precision)
    encoder = Encoder(spec)
    texts = synthetic_texts(encoder.tokenizer, 2000)
    reference = load_plain(spec, folder, "fp32").encode(texts, normalize_embeddings=True)
    cosine = (encoder.encode_documents(texts) * reference).sum(axis=1)
    assert cosine.mean() >= 0.9999
    assert cosine.min() >= 0.999


def test_out_of_memory_halves_the_budget_and_loses_nothing(model):
    encoder = Encoder(resolve_spec(model=model, precision="fp16")[0], batch_tokens=1 << 30)
    texts = synthetic_texts(encoder.tokenizer, 20_000)
    torch.cuda.set_per_process_memory_fraction(0.01)
    try:
        vectors = encoder.encode_documents(texts)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert np.isfinite(vectors).all()
    assert encoder.batch_tokens < 1 << 30


@pytest.mark.parametrize("shape", ["minilm-l6", "bge-base", "bge-large"])
def test_bench_beats_sentence_transformers(tmp_path, shape):
    spec, _ = resolve_spec(model=str(write_model(shape, tmp_path / shape)), precision="fp16")
    report = measure(spec, synthetic_texts(Encoder(spec).tokenizer, 20_000), baseline=True)
    print(report)
    assert report.batch_tokens in BUDGETS["cuda"]
    assert 0 < report.mfu <= 1
    assert min(row["ratio"] for name, row in report.baseline.items() if name != "ours") > 1
