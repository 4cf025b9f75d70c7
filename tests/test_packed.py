"""Texts without padding between them: torch's kernel runs on GPUs only, so a stand-in computes here what it promises."""

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import (
    BertConfig,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
    Qwen3Config,
    Qwen3Model,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from pipeline.encoding import packed
from pipeline.encoding.batching import lengths_of
from pipeline.encoding.model import resolve_spec
from pipeline.encoding.torch_engine import TorchEngine
from tests.gpu.random_models import VOCABULARY, tokenizer

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
LOCAL = {"pad_token_id": 0, "local_attention": 16, "global_attn_every_n_layers": 2}
OFFSET = {"pad_token_id": 0, "max_position_embeddings": 514}
MODELS = {
    "bert": (BertModel, BertConfig(**SMALL), "mean"),
    "positions after padding": (XLMRobertaModel, XLMRobertaConfig(**SMALL, **OFFSET), "cls"),
    "local attention": (ModernBertModel, ModernBertConfig(**SMALL, **LOCAL), "mean"),
    "causal, shared heads": (Qwen3Model, Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16), "lasttoken"),
}
BERT_ALONE = pytest.mark.parametrize("engine", ["bert"], indirect=True)
LENGTHS = (400, 70, 33, 5, 2, 1)


def attention_of_each(
    query, key, value, borders, borders_k, longest, longest_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """``torch.nn.attention.varlen.varlen_attn`` in plain terms: (tokens, heads, width) each."""
    assert borders.dtype == torch.int32
    assert torch.equal(borders, borders_k)
    assert longest == longest_k == int(borders.diff().max())
    found = torch.empty_like(query)
    for first, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        far = torch.arange(end - first)[None, :] - torch.arange(end - first)[:, None]
        back, ahead = (width if width >= 0 else end for width in window_size)
        mask = (far >= -back) & (far <= ahead)
        own = [part[first:end].transpose(0, 1)[None] for part in (query, key, value)]
        made = torch.nn.functional.scaled_dot_product_attention(*own, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
        found[first:end] = made[0].transpose(0, 1)
    return found


@pytest.fixture(params=MODELS)
def engine(request, tmp_path, monkeypatch):
    kind, config, pooling = MODELS[request.param]
    torch.manual_seed(0)
    made = kind(config)
    for weights in made.parameters():  # as they start, attention is nearly even and hides what it sees
        weights.data.normal_(std=0.1)
    made.save_pretrained(tmp_path / "plain")
    tokenizer().save_pretrained(tmp_path / "plain")
    first = Transformer(str(tmp_path / "plain"), max_seq_length=512)
    SentenceTransformer(modules=[first, Pooling(64, pooling), Normalize()], device="cpu").save(str(tmp_path / "model"))
    spec, folder = resolve_spec(model=str(tmp_path / "model"), precision="fp32", backend="torch")
    monkeypatch.setattr(packed, "varlen_attn", attention_of_each)
    return TorchEngine(spec, folder)


def tokens_of(lengths):
    random = np.random.default_rng(1)
    return [random.integers(5, VOCABULARY, length) for length in lengths]


def test_vectors_are_those_with_padding(engine):
    tokens = tokens_of(LENGTHS)
    engine.budget = 100_000
    padded = engine.run(tokens, lengths_of(tokens))
    assert not engine._packs
    assert engine.padded_tokens == len(LENGTHS) * max(LENGTHS)
    engine._pack(512)
    assert engine._packs, "the two forms differ"
    engine.padded_tokens = 0
    assert np.allclose(engine.run(tokens, lengths_of(tokens)), padded, atol=1e-5)
    assert engine.padded_tokens == sum(LENGTHS)


def test_parts_of_texts_are_still_read_with_padding(engine):
    tokens = tokens_of((60, 20))
    engine.budget = 100_000
    spans = [[(0, 30), (30, 60)], [(0, 20)]]
    before = engine.run_spans(tokens, lengths_of(tokens), spans)
    engine._pack(512)
    assert engine._packs
    assert np.allclose(engine.run_spans(tokens, lengths_of(tokens), spans), before, atol=1e-5)


@BERT_ALONE
def test_attention_that_gives_other_vectors_is_not_used(engine, monkeypatch):
    tokens = tokens_of(LENGTHS)
    before = engine.run(tokens, lengths_of(tokens))
    monkeypatch.setattr(packed, "varlen_attn", lambda query, *_, **__: torch.flip(query, [0]))
    engine._pack(512)
    assert not engine._packs
    assert np.array_equal(engine.run(tokens, lengths_of(tokens)), before)


@BERT_ALONE
def test_kernel_that_refuses_is_not_used(engine, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("FlashAttention forward only supports head dimension at most 256")

    monkeypatch.setattr(packed, "varlen_attn", refuse)
    tokens = tokens_of(LENGTHS)
    before = engine.run(tokens, lengths_of(tokens))
    engine._pack(512)
    assert not engine._packs
    assert np.array_equal(engine.run(tokens, lengths_of(tokens)), before)


@BERT_ALONE
def test_bias_by_distance_is_not_used(engine, monkeypatch):
    padded = packed.sdpa_attention_forward

    def without_bias(*args, **settings):
        return padded(*args, **{name: value for name, value in settings.items() if name != "position_bias"})

    monkeypatch.setattr(packed, "sdpa_attention_forward", without_bias)
    forward = engine._parts[0].model.forward
    monkeypatch.setattr(engine._parts[0].model, "forward", lambda **given: forward(**given, position_bias=torch.zeros(1)))
    engine._pack(512)
    assert not engine._packs


@BERT_ALONE
def test_prompt_may_be_left_out_of_the_mean(engine):
    tokens = tokens_of(LENGTHS[:-2])
    engine.budget = 100_000
    whole = engine.run(tokens, lengths_of(tokens))
    engine._parts[-2].include_prompt = False
    padded = engine.run(tokens, lengths_of(tokens), prompt_tokens=3)
    assert not np.allclose(padded, whole, atol=1e-3)
    engine._pack(512)
    assert engine._packs
    assert np.allclose(engine.run(tokens, lengths_of(tokens), prompt_tokens=3), padded, atol=1e-5)


def test_cpus_keep_padding():
    assert not packed.is_possible(torch.device("cpu"), "bf16")
