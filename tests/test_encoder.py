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
from pipeline.encoder import Encoder, load_query_encoder
from pipeline.encoding import calibration
from pipeline.encoding.batching import pack_batches, run_within
from pipeline.encoding.calibration import BUDGETS, calibrate
from pipeline.encoding.model import resolve_spec
from pipeline.encoding.model_files import hash_files
from pipeline.encoding.numerics import resolve_precision
from pipeline.encoding.torch_engine import TorchEngine
from pipeline.encoding.unit_vectors import mean_of_windows
from pipeline.errors import EncoderError
from pipeline.operations.what_if import flops_per_token
from tests.conftest import MINILM

ODD = [
    "", " ", "a", ".", "…", "\t\n", "🙂", "👩‍👩‍👧‍👦 family", "مرحبا بالعالم", "שלום עולם", "数学" * 300, "z" * 3000,
    "word " * 3000,
    "\u200b\u200b", "N/A", "0", "e\u0301", "الحكمة " * 500,
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
    assert encoder.cosine_to_exact([], np.empty((0, encoder.dim), dtype=np.float32)).shape == (0,)


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


def test_static_model_may_have_a_config_and_a_head(tmp_path, minilm):
    """As model2vec writes them; in bf16, what auto is on CPUs that have it."""
    from sentence_transformers.sentence_transformer.modules import Dense, StaticEmbedding
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm[1].path / "tokenizer.json"))
    modules = [StaticEmbedding(tokenizer, embedding_dim=32), Dense(32, 16)]
    model = SentenceTransformer(modules=modules, device="cpu")
    model.save(str(tmp_path / "static"))
    (tmp_path / "static" / "config.json").write_text(json.dumps({"model_type": "model2vec", "hidden_dim": 32}))
    texts = ["one text", "another, longer text " * 30, "a"]
    vectors = Encoder(resolve_spec(model=str(tmp_path / "static"), precision="bf16")[0]).encode_documents(texts)
    assert (vectors * model.encode(texts, normalize_embeddings=True)).sum(axis=1).min() > 0.9999


def test_rotary_positions_keep_their_precision(tmp_path, minilm):
    """Frequencies in bf16 would turn the positions of a long text by radians."""
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import AutoTokenizer, ModernBertConfig, ModernBertModel

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(str(minilm[1].path))
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = ModernBertConfig(vocab_size=len(tokenizer), pad_token_id=0, max_position_embeddings=2048, **sizes)
    ModernBertModel(config).save_pretrained(str(tmp_path / "bare"))
    tokenizer.save_pretrained(str(tmp_path / "bare"))
    first = Transformer(str(tmp_path / "bare"), max_seq_length=2048)
    model = SentenceTransformer(modules=[first, Pooling(64, "mean")], device="cpu")
    model.save(str(tmp_path / "m"))
    encoder = Encoder(resolve_spec(model=str(tmp_path / "m"), precision="bf16")[0])
    theirs, ours = dict(first.named_buffers()), dict(encoder._engine._parts[0].named_buffers())
    assert sum("inv_freq" in name for name in ours) >= 1
    assert all(torch.equal(buffer, theirs[name]) and buffer.dtype == theirs[name].dtype for name, buffer in ours.items())
    texts = ["sea harbour ship sand " * 350, "sand"]
    assert (encoder.encode_documents(texts) * model.encode(texts, normalize_embeddings=True)).sum(axis=1).min() > 0.999


@pytest.mark.parametrize("when", ["load", "run"])
def test_text_that_fits_nowhere_is_among_the_failed(minilm, monkeypatch, when):
    encoder = Encoder(minilm[0])
    tokens = encoder.tokenizer(["one", "x " * 200, "two words"])

    def forward(engine, batch, prompt_tokens, real=TorchEngine._forward):
        if max(len(ids) for ids in batch) > 100:
            raise torch.OutOfMemoryError
        return real(engine, batch, prompt_tokens)

    def full(*arguments, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(TorchEngine, "_forward", forward)
    if when == "load":
        monkeypatch.setattr("pipeline.encoding.torch_engine.SentenceTransformer", full)
    encoded = encoder.encode_tokens(tokens)
    assert list(encoded.failed) == [1]
    assert encoded.failed[1].startswith("E_OOM: ")
    assert np.isfinite(encoded.vectors[[0, 2]]).all()


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
    assert encoder.encode_tokens(encoder.tokenizer(texts)).rescued == 2


def test_a_text_of_which_a_window_has_no_vector_has_none(minilm):
    vectors = np.eye(4, dtype=np.float32)
    vectors[2] = np.nan
    means, failed = mean_of_windows(vectors, {2: "E_NONFINITE: 9 tokens"}, np.array([2, 2]))
    assert failed == {1: "E_NONFINITE: 9 tokens"}
    assert np.allclose(means[0], [0.5**0.5, 0.5**0.5, 0, 0])
    opposed = np.stack([vectors[0], -vectors[0], vectors[1]])
    assert mean_of_windows(opposed, {}, np.array([2, 1]))[1] == {0: "E_ZERO_NORM: the vectors of its windows cancel each other"}


def test_spans_of_whole_texts_are_the_texts_and_are_rescued_alike(minilm):
    encoder = Encoder(minilm[0])
    texts = ["one good text", "zebra", "two good words and a tail of some length", "x " * 400]
    tokens = encoder.tokenizer(texts)
    whole = np.array([[3, 0, len(tokens[3])], *([row, 0, len(tokens[row])] for row in (0, 1, 2))], dtype=np.int32)
    parts = np.array([[2, 4, len(tokens[2])], [1, 0, 2], [2, 0, 4]], dtype=np.int32)
    before = encoder.encode_spans(tokens, whole).vectors
    assert np.allclose(before, encoder.encode_tokens(tokens).vectors[[3, 0, 1, 2]], atol=1e-5)
    of_parts = encoder.encode_spans(tokens, parts)
    assert of_parts.tokens == sum(map(len, tokens[1:3])) and not of_parts.failed
    weights = encoder._engine._parts[0].get_parameter("model.embeddings.word_embeddings.weight")
    weights.data[tokens[1][1]] = float("nan")
    after = encoder.encode_spans(tokens, whole)
    assert (after.rescued, after.failed) == (1, {})
    assert np.allclose(after.vectors, before, atol=1e-5)
    encoder._exact_engine._parts[0].get_parameter("model.embeddings.word_embeddings.weight").data[tokens[1][1]] = float("nan")
    lost = encoder.encode_spans(tokens, parts)
    assert list(lost.failed) == [1] and lost.failed[1].startswith("E_NONFINITE: 3 tokens")
    assert np.isnan(lost.vectors[1]).all()
    assert np.allclose(lost.vectors[[0, 2]], of_parts.vectors[[0, 2]], atol=1e-5)


def test_text_without_a_finite_vector_is_named(tmp_path, minilm):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(minilm[1].path, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    token = Encoder(minilm[0]).tokenizer(["zebra"])[0][1]
    weights[next(name for name in weights if name.endswith("word_embeddings.weight"))][token] = np.nan
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    for backend in ("torch", "openvino"):
        encoder = Encoder(resolve_spec(model=str(tmp_path / "m"), backend=backend)[0])
        with pytest.raises(EncoderError, match=r"text 1 of 3 has no vector, E_NONFINITE: 3 tokens, .*not finite"):
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


def test_query_model_encodes_the_queries(tmp_path, minilm):
    shutil.copytree(minilm[1].path, tmp_path / "q")
    spec, _ = resolve_spec(model=MINILM, query_model=str(tmp_path / "q"), query_prompt="find: ")
    other = replace(minilm[0], query_prompt="find: ")
    vector = load_query_encoder(spec).encode_queries(["a harbour"])
    assert (vector * Encoder(other).encode_queries(["a harbour"])).sum() > 0.999
    (tmp_path / "q" / "vocab.txt").write_text("another\n")
    hash_files.cache_clear()
    with pytest.raises(EncoderError, match="not the query model that the artifact was made for"):
        load_query_encoder(spec)


def test_texts_are_packed_as_sentence_transformers_packs_them(minilm):
    """The kernel needs a GPU; what it is given can be compared anywhere."""
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


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vecmill" / "graphs"


def test_traced_model_is_kept_and_needs_no_torch_again(minilm, cache):
    spec = replace(minilm[0], backend="openvino")
    before = Encoder(spec).encode_documents(["a text", "b " * 90])
    script = (
        "import json, sys; from pipeline.encoder import Encoder; from pipeline.encoding.model import EncoderSpec\n"
        "encoder = Encoder(EncoderSpec(**json.loads(sys.argv[1])))\n"
        "vectors = encoder.encode_documents(['a text', 'b ' * 90])\n"
        "assert encoder.matmul_rate() > 1e9 and encoder.flops_per_token\n"
        "assert 'torch' not in sys.modules\n"
        "print(json.dumps(vectors.tolist()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(spec.as_dict())], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert np.allclose(before, json.loads(done.stdout), atol=1e-5)


@pytest.mark.parametrize("file", ["model.bin", "model.xml", "facts.json"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: bytes(len(data)), lambda data: b""])
def test_damaged_traced_model_is_made_again(minilm, cache, file, damage):
    spec = replace(minilm[0], backend="openvino")
    before = Encoder(spec).encode_documents(["a text"])
    (kept,) = cache.iterdir()
    damaged = damage((kept / file).read_bytes())
    (kept / file).write_bytes(damaged)
    assert np.allclose(before, Encoder(spec).encode_documents(["a text"]), atol=1e-5)
    assert (kept / file).read_bytes() != damaged
    assert list(cache.iterdir()) == [kept]


def test_cache_that_cannot_be_written_costs_only_time(minilm, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert Encoder(replace(minilm[0], backend="openvino")).encode_documents(["a"]).shape == (1, 384)


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_calibration_chooses_a_budget_and_changes_no_vector(minilm, backend, monkeypatch):
    encoder = Encoder(replace(minilm[0], backend=backend), batch_tokens=77)
    rate = calibration._rate
    monkeypatch.setattr(calibration, "_rate", lambda *sample: max(rate(*sample), 5000.0))  # a busy machine may seem too slow
    before = encoder.encode_documents(["a text", "b " * 90])
    calibrate(encoder)
    assert encoder.batch_tokens in BUDGETS["cpu"]
    assert (before * encoder.encode_documents(["a text", "b " * 90])).sum(axis=1).min() > 0.99999


def test_a_slow_model_keeps_its_budget(minilm, monkeypatch):
    encoder = Encoder(minilm[0], batch_tokens=777)
    monkeypatch.setattr("pipeline.encoding.calibration.SECONDS", 1e-6)
    calibrate(encoder)
    assert encoder.batch_tokens == 777


def test_encoded_counts_real_and_padded_tokens(minilm):
    encoder = Encoder(minilm[0], batch_tokens=16)
    encoded = encoder.encode_tokens([[101, 7592, 102], [101, 102], [101, 7592, 7592, 7592, 102]])
    assert (encoded.tokens, encoded.padded_tokens, encoded.failed) == (10, 15, {})
    assert encoder.flops_per_token == flops_per_token(minilm[1], 0) == 6 * 2 * (4 * 384 * 384 + 2 * 384 * 1536)


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
