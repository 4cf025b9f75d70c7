import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from transformers import DataCollatorWithFlattening

from jobs.demo_corpus import docstrings
from pipeline.batching import pack_batches, padded_tokens, run_within
from pipeline.encoder import BUDGETS, Encoder, load_query_encoder
from pipeline.errors import EncoderError
from pipeline.model import _hash_files, resolve_spec
from pipeline.numerics import resolve_precision
from tests.conftest import MINILM

ODD = [
    "", " ", "a", ".", "…", "\t\n", "🙂", "👩‍👩‍👧‍👦 family", "مرحبا بالعالم", "שלום עולם", "数学" * 300, "z" * 3000,
    "word " * 3000,
    "\u200b\u200b", "[SEP] [CLS] [MASK]", "N/A", "0", "e\u0301", "الحكمة " * 500,
]  # fmt: skip


@pytest.fixture(scope="module")
def texts():
    """1,000 real texts of mixed length: docstrings whole, cut short, and joined long, with the odd ones among them."""
    real = [row["text"] for row, _ in zip(docstrings(), range(400), strict=False)]
    short = [text[: 3 + 7 * (number % 12)] for number, text in enumerate(real)]
    long = [" ".join(real[number : number + 5]) for number in range(0, 400, 2)]
    return ((ODD + short + long + real) * 2)[:1000]


@pytest.fixture(scope="module")
def reference(texts, minilm):
    model = SentenceTransformer(str(minilm[1].path), device="cpu")
    return model.encode_document(texts, convert_to_numpy=True, normalize_embeddings=True)


@pytest.mark.parametrize("backend", ["torch", "openvino"])
@pytest.mark.parametrize(("precision", "limit"), [("fp32", 0.999999), ("bf16", 0.9999)])
def test_vectors_equal_those_of_sentence_transformers(texts, reference, precision, limit, backend):
    if precision == "bf16" and resolve_precision("auto", on_gpu=False) != "bf16":
        pytest.skip("this CPU has no native bf16")
    encoder = Encoder(resolve_spec(model=MINILM, precision=precision, backend=backend)[0])
    vectors = encoder.encode_documents(texts)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    cosine = (vectors * reference).sum(axis=1)
    print(f"{backend} {precision}: cosine mean {cosine.mean():.7f}, minimum {cosine.min():.7f}")
    assert cosine.mean() >= limit
    assert cosine.min() >= (0.999 if precision == "bf16" else limit)


def test_stored_half_precision_keeps_the_cosine(reference):
    stored = reference.astype(np.float16).astype(np.float32)
    assert ((stored * reference).sum(axis=1) / np.linalg.norm(stored, axis=1)).min() >= 0.999999


def test_int8_keeps_the_cosine_it_states(texts, reference):
    encoder = Encoder(resolve_spec(model=MINILM, precision="int8", backend="openvino")[0])
    vectors = encoder.encode_documents(texts)
    cosine = (vectors * reference).sum(axis=1)
    print(f"int8: cosine mean {cosine.mean():.5f}, minimum {cosine.min():.5f}")
    assert cosine.mean() >= 0.998
    assert cosine.min() >= 0.98
    tokens = encoder.tokenizer(texts[40:60])
    assert np.allclose(encoder.cosine_to_exact(tokens, vectors[40:60]), cosine[40:60], atol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_prompts_are_those_of_sentence_transformers(minilm, backend):
    model = SentenceTransformer(str(minilm[1].path), device="cpu", prompts={"query": "query: ", "document": "passage: "})
    encoder = Encoder(resolve_spec(model=MINILM, query_prompt="query: ", document_prompt="passage: ", backend=backend)[0])
    texts = ["what is it", "a longer text about it"]
    for ours, theirs in (
        (encoder.encode_queries(texts), model.encode_query(texts)),
        (encoder.encode_documents(texts), model.encode_document(texts)),
    ):
        assert (ours * theirs).sum(axis=1).min() > 0.999999


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_order_and_neighbours_do_not_matter(minilm, backend):
    encoder = Encoder(replace(minilm[0], backend=backend))
    texts = ["one", "two words", "x " * 500, "three small words", "", "y " * 100]
    together = encoder.encode_documents(texts)
    alone = np.concatenate([encoder.encode_documents([text]) for text in texts])
    assert (together * alone).sum(axis=1).min() > 1 - 1e-5
    assert encoder.encode_documents([]).shape == (0, 384)


@settings(max_examples=200)
@given(st.lists(st.integers(0, 600), max_size=80), st.integers(1, 2000))
def test_pack_batches_covers_everything_within_the_budget(lengths, budget):
    ordered = np.sort(np.array(lengths, dtype=np.int64))[::-1]
    runs = list(pack_batches(ordered, budget))
    assert [number for first, end in runs for number in range(first, end)] == list(range(len(lengths)))
    for first, end in runs:
        assert end - first == 1 or (end - first) * max(1, ordered[first]) <= budget


def test_encoder_refuses_another_model_than_planned(minilm):
    with pytest.raises(EncoderError, match="was planned with"):
        Encoder(replace(minilm[0], space="0" * 20))


def test_query_encoder_needs_only_the_same_space(minilm):
    vectors = load_query_encoder(replace(minilm[0], precision="fp16")).encode_queries(["hello"])
    assert (vectors * Encoder(minilm[0]).encode_queries(["hello"])).sum() > 0.999


def test_static_model_is_encoded_as_sentence_transformers_does(tmp_path, minilm):
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm[1].path / "tokenizer.json"))
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=32), Normalize()], device="cpu")
    model.save(str(tmp_path / "static"))
    spec, _ = resolve_spec(model=str(tmp_path / "static"))
    encoded = Encoder(spec).encode_tokens([[], [5, 6], []])
    assert sorted(encoded.failed) == [0, 2]
    assert np.isfinite(encoded.vectors[1]).all()
    texts = ["one text", "another, longer text " * 300, "a"]
    assert spec.dim == 32
    assert (Encoder(spec).encode_documents(texts) * model.encode(texts)).sum(axis=1).min() > 0.99999


def test_broken_weights_are_one_clear_error(tmp_path, minilm):
    shutil.copytree(minilm[1].path, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00 not a header")
    with pytest.raises(EncoderError, match="cannot be loaded"):
        Encoder(resolve_spec(model=str(tmp_path / "m"))[0])


@settings(max_examples=300)
@given(st.lists(st.integers(0, 60), max_size=40), st.integers(1, 3000), st.integers(0, 3000))
def test_run_within_halves_the_budget_until_every_batch_fits(lengths, budget, limit):
    """An encoder that fails above ``limit`` padded tokens, for every limit: it ends with all rows but those too long."""
    ordered = np.sort(np.array(lengths, dtype=np.int64))[::-1]
    failed = []

    def run(first, end):
        if int(ordered[first]) * (end - first) > limit:
            failed.append((first, end))
            raise MemoryError
        return list(range(first, end))

    results, left = run_within(ordered, budget, run, MemoryError)
    too_long = int((ordered > limit).sum())
    assert results[:too_long] == [None] * too_long
    assert [row for rows in results[too_long:] for row in rows] == list(range(too_long, len(ordered)))
    assert left <= budget if failed else left == budget
    assert len(failed) <= too_long + 1 + np.log2(max(1, budget))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_poisoned_text_is_rescued_and_harms_no_neighbour(precision):
    if precision == "bf16" and resolve_precision("auto", on_gpu=False) != "bf16":
        pytest.skip("this CPU has no native bf16")
    encoder = Encoder(resolve_spec(model=MINILM, precision=precision)[0])
    texts = ["one good text", "zebra", "two good words", "a zebra in the middle of words", "x " * 400]
    before = encoder.encode_documents(texts)
    weights = encoder._engine._parts[0].get_parameter("model.embeddings.word_embeddings.weight")
    weights.data[encoder.tokenizer(["zebra"])[0][1]] = float("nan")
    after = encoder.encode_documents(texts)
    assert (before * after).sum(axis=1).min() > 0.999


def test_text_without_a_finite_vector_is_named(tmp_path, minilm):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(minilm[1].path, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    token = Encoder(minilm[0]).tokenizer(["zebra"])[0][1]
    weights[next(name for name in weights if name.endswith("word_embeddings.weight"))][token] = np.nan
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    for backend in ("torch", "openvino"):
        encoder = Encoder(resolve_spec(model=str(tmp_path / "m"), backend=backend)[0])
        with pytest.raises(EncoderError, match=r"text 1 of 3 has no vector, 3 tokens, .*not finite"):
            encoder.encode_documents(["good", "zebra", "fine"])
        encoded = encoder.encode_tokens(encoder.tokenizer(["good", "zebra", "fine"]))
        assert list(encoded.failed) == [1]
        assert np.isfinite(encoded.vectors).all(axis=1).tolist() == [True, False, True]
        assert np.allclose(encoded.vectors[[0, 2]], encoder.encode_documents(["good", "fine"]), atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_dim_is_that_of_truncate_dim(minilm, backend):
    model = SentenceTransformer(str(minilm[1].path), device="cpu", truncate_dim=64)
    texts = ["one text", "another, longer text"]
    vectors = Encoder(resolve_spec(model=MINILM, dim=64, backend=backend)[0]).encode_documents(texts)
    assert vectors.shape == (2, 64)
    assert (vectors * model.encode(texts, normalize_embeddings=True)).sum(axis=1).min() > 0.99999


@pytest.mark.parametrize("serving", [False, True])
def test_query_model_encodes_the_queries(tmp_path, minilm, serving):
    shutil.copytree(minilm[1].path, tmp_path / "q")
    spec, _ = resolve_spec(model=MINILM, query_model=str(tmp_path / "q"), query_prompt="find: ")
    other = replace(minilm[0], query_prompt="find: ")
    vector = load_query_encoder(spec, serving=serving).encode_queries(["a harbour"])
    assert (vector * Encoder(other).encode_queries(["a harbour"])).sum() > 0.999
    (tmp_path / "q" / "vocab.txt").write_text("another\n")
    _hash_files.cache_clear()
    with pytest.raises(EncoderError, match="not the query model that the artifact was made for"):
        load_query_encoder(spec)


def test_texts_are_packed_as_sentence_transformers_packs_them(minilm):
    """For flash attention, which needs a GPU; what it is given can be compared anywhere."""
    encoder = Encoder(minilm[0])
    engine, first = encoder._engine, encoder._engine._model[0]
    first.data_collator = DataCollatorWithFlattening(
        return_seq_idx=True, return_flash_attn_kwargs=True, return_position_ids=True
    )
    first.can_flatten_inputs, first._flatten_position_offset = True, 0
    texts = ["one text", "a", "another, longer text"]
    theirs = engine._model.preprocess(texts)
    ours = engine._packed(encoder.tokenizer(texts))
    assert {"input_ids", "position_ids", "cu_seq_lens_q", "max_length_q"} <= ours.keys() <= theirs.keys()
    for name, value in ours.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[name])), name


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_calibration_chooses_a_budget_and_changes_no_vector(minilm, backend):
    encoder = Encoder(replace(minilm[0], backend=backend))
    before = encoder.encode_documents(["a text", "b " * 90])
    encoder.calibrate()
    assert encoder.batch_tokens in BUDGETS["cpu"]
    assert (before * encoder.encode_documents(["a text", "b " * 90])).sum(axis=1).min() > 0.99999


def test_a_slow_model_keeps_its_budget(minilm, monkeypatch):
    encoder = Encoder(minilm[0], batch_tokens=777)
    monkeypatch.setattr("pipeline.encoder.CALIBRATION_SECONDS", 1e-6)
    encoder.calibrate()
    assert encoder.batch_tokens == 777


def test_encoded_counts_real_and_padded_tokens(minilm):
    encoder = Encoder(minilm[0], batch_tokens=16)
    encoded = encoder.encode_tokens([[101, 7592, 102], [101, 102], [101, 7592, 7592, 7592, 102]])
    assert (encoded.tokens, encoded.padded_tokens, encoded.failed) == (10, 15, {})
    assert padded_tokens(np.array([5, 3, 2]), 10) == 10 + 2
    assert encoder.flops_per_token == 6 * 2 * (4 * 384 * 384 + 2 * 384 * 1536)


def test_bench_reports_rates_quality_and_latency():
    command = [sys.executable, "-m", "pipeline.encoder", "bench", "--model", MINILM, "--count", "40", "--rounds", "1"]
    done = subprocess.run([*command, "--baseline", "--json"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert 0 < report["mfu"] <= 1.2
    assert report["tokens_per_s"] > 100
    assert report["cosine_mean"] > 0.999
    assert report["query_p50_ms"] <= report["query_p99_ms"]
    assert len(report["baseline"]) == 3
    broken = subprocess.run([*command[:5], "no/such/model"], capture_output=True, text=True, timeout=100)
    assert broken.returncode == 1
    assert "bench: encoder.model: no/such/model" in broken.stderr
