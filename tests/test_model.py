import json
import shutil
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer

from pipeline.encoding.model import find_model, resolve_spec
from pipeline.encoding.numerics import resolve_backend, resolve_precision
from pipeline.encoding.tokenizer import TextTokenizer
from pipeline.errors import ConfigError, EncoderError
from tests.conftest import MINILM

TEXTS = [
    "",
    " ",
    "a",
    "Hello, wörld!",
    "x" * 5000,
    "word " * 1000,
    "مرحبا بالعالم",
    "🙂🙂 a\u200db",
    "tab\tand\nnewline",
]


def test_tokenizer_gives_the_ids_of_sentence_transformers(minilm):
    spec, folder = minilm
    model = SentenceTransformer(str(folder.path), device="cpu")
    ours = TextTokenizer(folder, spec.max_tokens)(TEXTS)
    for text, ids in zip(TEXTS, ours, strict=True):
        assert ids == model.preprocess([text])["input_ids"][0].tolist(), text[:40]


@pytest.fixture(scope="module")
def tokenizer(minilm):
    return TextTokenizer(minilm[1], 64)


SPECIAL = ("[SEP]", "[CLS]", "[MASK]", "[PAD]", "[UNK]")


@given(st.lists(st.sampled_from((*SPECIAL, "sea", " ", "[", "]", "Ünïcode", "[sep]")), min_size=1, max_size=12).map("".join))
def test_texts_that_spell_out_special_tokens_have_none(tokenizer, text):
    special = {tokenizer._tokenizer.token_to_id(token) for token in SPECIAL[:4]}
    (ids,) = tokenizer([text])
    assert not special & set(ids[1:-1])
    assert ids[0] != ids[-1] and {ids[0], ids[-1]} <= special
    assert tokenizer.count([text]) == [len(ids)]
    assert all(0 <= start <= end <= len(text) for start, end in tokenizer.offsets(text))


def test_a_prompt_with_a_special_token_keeps_it(minilm):
    plain, prompted = TextTokenizer(minilm[1], 64), TextTokenizer(minilm[1], 64, ("[CLS] find: ", ""))
    assert prompted(["[CLS] find: sea"])[0].count(prompted(["sea"])[0][0]) == 2
    assert plain(["[CLS] find: sea"])[0].count(plain(["sea"])[0][0]) == 1


def test_tokenizer_cuts_huge_texts_before_tokenizing(minilm):
    tokenizer = TextTokenizer(minilm[1], 256)
    huge = "some words and more of them " * 400_000
    (ids,) = tokenizer([huge])
    assert ids == tokenizer([huge[:20_000]])[0]
    assert tokenizer.count([huge])[0] > 256


def test_tokenizer_reads_on_where_the_beginning_is_mostly_white(minilm):
    tokenizer = TextTokenizer(minilm[1], 16)
    text = "first" + " " * 50_000 + "last"
    assert tokenizer([text])[0] == tokenizer(["first last"])[0]


def test_spec_names_what_changes_vectors():
    base, _ = resolve_spec(model=MINILM)
    for change in ({"document_prompt": "passage: "}, {"max_tokens": 128}, {"precision": "bf16"}):
        other, _ = resolve_spec(**{"model": MINILM, **change})
        assert other.fingerprint != base.fingerprint, change
    query, _ = resolve_spec(model=MINILM, query_prompt="query: ")
    assert query.fingerprint == base.fingerprint
    precise, _ = resolve_spec(model=MINILM, precision="bf16")
    assert precise.space == base.space
    assert base.dim == 384
    assert base.max_tokens == 256


def test_spec_is_the_same_from_another_folder(tmp_path, minilm):
    shutil.copytree(minilm[1].path, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("changed")
    assert resolve_spec(model=str(tmp_path / "copy"))[0].fingerprint == minilm[0].fingerprint


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("package:no_such_package/model", "pip install"),
        ("package:no.such/model", "pip install"),
        ("package:/model", "pip install"),
        ("no/such", "encoder.revision"),
        ("nowhere", "no such folder"),
    ],
)
def test_missing_model_says_what_to_do(model, message):
    with pytest.raises(ConfigError, match=message):
        find_model(model)


def test_pickled_weights_are_refused(tmp_path, minilm):
    shutil.copytree(minilm[1].path, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(EncoderError, match="safetensors"):
        find_model(str(tmp_path / "m"))
    (tmp_path / "m" / "modules.json").write_text("{")
    with pytest.raises(EncoderError, match="not valid JSON"):
        find_model(str(tmp_path / "m"))


def test_max_tokens_over_the_positions_is_refused():
    with pytest.raises(ConfigError, match="512 positions"):
        resolve_spec(model=MINILM, max_tokens=600)


def test_fp16_needs_cuda():
    assert resolve_precision("auto", on_gpu=True) == "fp16"
    assert resolve_precision("auto", on_gpu=False) in {"bf16", "fp32"}
    with pytest.raises(ConfigError, match="fp16 needs CUDA"):
        resolve_precision("fp16", on_gpu=False)


def test_int8_is_for_openvino_on_cpus(minilm):
    assert resolve_precision("int8", on_gpu=False) == "int8"
    assert resolve_backend("auto", minilm[1], on_gpu=False, precision="int8") == "openvino"
    with pytest.raises(ConfigError, match="int8 is for CPU encoders"):
        resolve_precision("int8", on_gpu=True)
    with pytest.raises(ConfigError, match=r"int8 needs encoder\.backend openvino"):
        resolve_backend("torch", minilm[1], on_gpu=False, precision="int8")


@pytest.mark.parametrize(
    ("change", "expected"),
    [({}, "fp16"), ({"dtype": "bfloat16"}, "bf16"), ({"torch_dtype": "bfloat16"}, "bf16"), ({"model_type": "t5"}, "bf16")],
)
def test_models_that_overflow_in_fp16_are_bf16_on_gpus(tmp_path, minilm, change, expected):
    shutil.copytree(minilm[1].path, tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    found = find_model(str(tmp_path / "m"))
    assert resolve_precision("auto", on_gpu=True, overflows=found.overflows) == expected


def test_dim_keeps_leading_dimensions_as_another_space():
    whole, _ = resolve_spec(model=MINILM)
    half, _ = resolve_spec(model=MINILM, dim=192)
    assert (whole.dim, half.dim) == (384, 192)
    assert half.space != whole.space
    assert resolve_spec(model=MINILM, dim=384)[0].space == whole.space
    assert resolve_spec(**half.request)[0] == half
    with pytest.raises(ConfigError, match=r"encoder.dim: 385, but .* has 384 dimensions"):
        resolve_spec(model=MINILM, dim=385)


def test_code_of_a_model_needs_a_pinned_commit():
    for revision in (None, "main", "a" * 39):
        with pytest.raises(ConfigError, match="only from a pinned commit"):
            resolve_spec(model=MINILM, revision=revision, trust_remote_code=True)
    assert resolve_spec(model=MINILM, revision="a" * 40, trust_remote_code=True)[0].trust_remote_code


def test_code_of_another_repository_is_not_pinned_and_refused(tmp_path, minilm):
    shutil.copytree(minilm[1].path, tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoModel": "some/code--modeling.Model"}}))
    with pytest.raises(EncoderError, match=r"some/code--modeling\.Model is code of another repository"):
        resolve_spec(model=str(tmp_path / "m"), revision="a" * 40, trust_remote_code=True)


def test_prompt_for_documents_is_found_as_sentence_transformers_finds_it(tmp_path, minilm):
    shutil.copytree(minilm[1].path, tmp_path / "m")
    settings = tmp_path / "m" / "config_sentence_transformers.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"prompts": {"query": "q: ", "passage": "p: "}}))
    spec, _ = resolve_spec(model=str(tmp_path / "m"))
    assert (spec.query_prompt, spec.document_prompt) == ("q: ", "p: ")


def test_query_model_must_have_the_dimension_of_the_model(tmp_path, minilm):
    shutil.copytree(minilm[1].path, tmp_path / "m")
    pooling = tmp_path / "m" / "1_Pooling" / "config.json"
    settings = json.loads(pooling.read_text())
    name = "embedding_dimension" if "embedding_dimension" in settings else "word_embedding_dimension"
    pooling.write_text(json.dumps(settings | {name: 128}))
    with pytest.raises(ConfigError, match=r"encoder.query_model: 128 dimensions, encoder.model has 384"):
        resolve_spec(model=MINILM, query_model=str(tmp_path / "m"))


def test_auto_backend_is_openvino_for_transformers_on_a_cpu(tmp_path, minilm):
    folder = minilm[1]
    assert resolve_backend("auto", folder, on_gpu=False, precision="bf16") == "openvino"
    assert resolve_backend("auto", folder, on_gpu=True, precision="bf16") == "torch"
    assert resolve_backend("torch", folder, on_gpu=False, precision="bf16") == "torch"
    with pytest.raises(ConfigError, match="the encoders have GPUs"):
        resolve_backend("openvino", folder, on_gpu=True, precision="bf16")
    shutil.copytree(folder.path, tmp_path / "m")
    pooling = tmp_path / "m" / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps(json.loads(pooling.read_text()) | {"include_prompt": False}))
    found = find_model(str(tmp_path / "m"))
    assert resolve_backend("auto", found, on_gpu=False, precision="bf16") == "torch"
    with pytest.raises(ConfigError, match="no transformer pooled over all tokens"):
        resolve_backend("openvino", found, on_gpu=False, precision="bf16")


def test_backend_is_part_of_the_store_not_of_the_space(minilm):
    torch_spec, engine = minilm[0], replace(minilm[0], backend="openvino")
    assert (torch_spec.space == engine.space, torch_spec.fingerprint == engine.fingerprint) == (True, False)


def test_prompts_come_from_the_model_unless_set(tmp_path, minilm):
    shutil.copytree(minilm[1].path, tmp_path / "m")
    settings = tmp_path / "m" / "config_sentence_transformers.json"
    settings.write_text(json.dumps({"prompts": {"query": "q: ", "document": "d: "}}))
    spec, _ = resolve_spec(model=str(tmp_path / "m"))
    assert (spec.query_prompt, spec.document_prompt) == ("q: ", "d: ")
    assert resolve_spec(model=str(tmp_path / "m"), document_prompt="")[0].document_prompt == ""
