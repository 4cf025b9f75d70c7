"""What only a GPU can show; skipped without one. ``python -m pytest tests/gpu``."""

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder

from pipeline.encoder import Encoder
from pipeline.encoding.encoder_bench import synthetic_texts
from pipeline.encoding.model import resolve_spec
from pipeline.encoding.tokenizer import TextTokenizer
from pipeline.encoding.torch_engine import DTYPES, load_plain
from pipeline.search.reranker import load_reranker
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
    assert (reference[1:] * reference[:-1]).sum(axis=1).mean() < 0.99, "texts that are alike tell nothing"
    assert cosine.mean() >= 0.9999
    assert cosine.min() >= 0.999


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="an older GPU")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_texts_are_packed_without_padding(model, precision):
    encoder = Encoder(resolve_spec(model=model, precision=precision)[0])
    tokens = encoder.tokenizer(synthetic_texts(encoder.tokenizer, 500))
    packed = encoder.encode_tokens(tokens)
    assert packed.padded_tokens == packed.tokens
    encoder._engine._packs = False
    padded = encoder.encode_tokens(tokens)
    assert padded.padded_tokens > padded.tokens
    cosine = (packed.vectors * padded.vectors).sum(axis=1)
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


def test_late_chunks_are_those_of_fp32(model):
    spec, _ = resolve_spec(model=model, precision="fp16")
    encoder = Encoder(spec)
    tokens = encoder.tokenizer(synthetic_texts(encoder.tokenizer, 200))
    spans = np.array(
        [[row, start, min(start + 64, len(ids))] for row, ids in enumerate(tokens) for start in range(0, len(ids), 64)],
        dtype=np.int32,
    )
    found = encoder.encode_spans(tokens, spans)
    exact = Encoder(resolve_spec(model=model, precision="fp32")[0]).encode_spans(tokens, spans).vectors
    cosine = (found.vectors * exact).sum(axis=1)
    assert not found.failed
    assert cosine.mean() >= 0.9999
    assert cosine.min() >= 0.999


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("kind", [CrossEncoder, MultiVectorEncoder])
def test_rerankers_score_as_sentence_transformers_does(model, kind, precision, tmp_path):
    torch.manual_seed(0)
    made = kind(model, device="cuda", **({"activation_fn": torch.nn.Identity()} if kind is CrossEncoder else {}))
    if kind is CrossEncoder:  # else all scores are alike
        made.model.bert.pooler.dense.weight.data.normal_(std=0.3)
        made.model.classifier.weight.data.normal_()
    made.save(str(tmp_path / "made"))
    reranker = load_reranker(str(tmp_path / "made"), precision=precision)
    query, *texts = synthetic_texts(TextTokenizer(resolve_spec(model=model)[1], 512), 100)
    query = " ".join(query.split()[:8])
    expected, theirs = (
        _plain_scores(kind, tmp_path / "made", dtype, query, texts) for dtype in (torch.float32, DTYPES[precision])
    )
    off = np.abs(reranker.score(query, texts) - expected)
    spread = float(np.std(expected))
    assert spread > 0.01
    assert off.max() < 0.02 * spread if precision == "fp32" else off.mean() <= 1.25 * np.abs(theirs - expected).mean()


def _plain_scores(kind, folder, dtype, query, texts):
    plain = kind(str(folder), device="cuda", model_kwargs={"dtype": dtype}).eval()
    if kind is CrossEncoder:
        return plain.predict([(query, text) for text in texts])
    return plain.similarity(plain.encode_query([query]), plain.encode_document(texts))[0].float().cpu().numpy()
