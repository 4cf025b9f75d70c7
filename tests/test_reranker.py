import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

from pipeline.config import SearchConfig
from pipeline.config_file import parse_config
from pipeline.encoding.numerics import native_bf16
from pipeline.encoding.tokenizer import PairTokenizer
from pipeline.errors import ConfigError, EncoderError
from pipeline.search.cross_encoder import CrossEncoding
from pipeline.search.reranker import BLOCK_TEXTS, FIRST_TEXTS, load_reranker, rerank
from pipeline.search.reranking import Reranking
from pipeline.search.searcher import FoundText
from tests.conftest import MINILM

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2}
QUERY = "Which harbour has a lighthouse?"
TEXTS = [
    "The harbour of Alexandria had one.", "", " ", "a", "No.", "🙂 مرحبا 数学", "harbour " * 300, "z" * 900,
    "An orchard in the meadow, a comet above it, and an anchor. " * 3,
    *(f"Note {number} on lighthouses" + " and lanterns" * (number * 7 % 40) for number in range(60)),
]  # fmt: skip


def save_model(folder: Path, path: Path, outputs: int = 1, **settings) -> Path:
    """A tiny random BERT that classifies pairs, as plain transformers saves it, with the tokenizer of MiniLM."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(str(path), model_max_length=128)
    config = BertConfig(
        vocab_size=len(tokenizer), num_labels=outputs, max_position_embeddings=160, initializer_range=0.3, **SIZES, **settings
    )
    BertForSequenceClassification(config).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, minilm):
    return save_model(tmp_path_factory.mktemp("reranker"), minilm[1].path)


@pytest.fixture
def reranker(folder):
    return load_reranker(str(folder), precision="fp32")


@pytest.fixture(scope="module")
def expected(folder):
    scores = CrossEncoder(str(folder), device="cpu").predict([(QUERY, text) for text in TEXTS])
    assert np.ptp(scores) > 0.1
    return scores


def test_scores_equal_those_of_sentence_transformers(reranker, expected):
    scores = reranker.score(QUERY, TEXTS)
    assert (scores.dtype, scores.shape, reranker.max_tokens) == (np.float32, (len(TEXTS),), 128)
    assert np.allclose(scores, expected, rtol=0, atol=1e-5)


def test_folder_saved_by_sentence_transformers_gives_the_same(folder, tmp_path, expected):
    CrossEncoder(str(folder), device="cpu", activation_fn=torch.nn.Identity()).save(str(tmp_path / "m"))
    assert (tmp_path / "m" / "modules.json").is_file()
    scores = load_reranker(str(tmp_path / "m"), precision="fp32").score(QUERY, TEXTS)
    assert np.allclose(1 / (1 + np.exp(-scores)), expected, rtol=0, atol=1e-5)


def test_default_prompt_is_put_before_the_query(folder, tmp_path):
    model = CrossEncoder(str(folder), device="cpu", prompts={"find": "Find notes: "}, default_prompt_name="find")
    model.save(str(tmp_path / "m"))
    scores = load_reranker(str(tmp_path / "m"), precision="fp32").score(QUERY, TEXTS)
    assert np.allclose(scores, model.predict([(QUERY, text) for text in TEXTS]), rtol=0, atol=1e-5)


@pytest.mark.skipif(not native_bf16(), reason="this CPU has no native bf16")
def test_half_precision_keeps_the_scores_apart(folder, expected):
    """A last layer in bf16 has 8 bits for a score, so that texts tie."""
    half = load_reranker(str(folder))
    assert half.precision == "bf16"
    scores = half.score(QUERY, TEXTS)
    assert np.median(np.abs(scores - expected)) < 0.02
    assert np.corrcoef(scores, expected)[0, 1] > 0.95
    plain = CrossEncoder(str(folder), device="cpu", model_kwargs={"dtype": torch.bfloat16})
    tied = len(TEXTS) - len(np.unique(plain.predict([(QUERY, text) for text in TEXTS])))
    print(f"tied: {tied} of {len(TEXTS)} in bf16 throughout, {len(TEXTS) - len(np.unique(scores))} here")
    assert len(TEXTS) - len(np.unique(scores)) < tied / 2


def test_order_and_neighbours_do_not_matter(reranker, expected):
    order = np.random.default_rng(0).permutation(len(TEXTS))
    assert np.allclose(reranker.score(QUERY, [TEXTS[row] for row in order]), expected[order], rtol=0, atol=1e-5)
    assert np.allclose(np.concatenate([reranker.score(QUERY, [text]) for text in TEXTS[:12]]), expected[:12], rtol=0, atol=1e-5)


@pytest.mark.parametrize("budget_s", [None, 1.0, 0.0])
def test_no_texts_have_no_scores(reranker, budget_s):
    scores = reranker.score(QUERY, [], budget_s=budget_s)
    assert (scores.dtype, scores.shape) == (np.float32, (0,))
    assert rerank(scores).shape == (0,)


class Clock:
    """Tells how long a model would have run that takes a second per token, padding included."""

    def __init__(self, reranker):
        self.now = 0.0
        self.batches = []
        forward = reranker._scoring.score

        def counted(batch):
            self.batches.append([len(pair.ids) for pair in batch])
            self.now += len(batch) * max(self.batches[-1])
            return forward(batch)

        reranker._scoring.score = counted
        reranker.clock = lambda: self.now


@pytest.mark.parametrize("budget_s", [1, 150, 400, 1000, 2500])
def test_what_is_not_scored_in_time_is_the_end_of_the_ranking(reranker, expected, budget_s):
    clock = Clock(reranker)
    scores = reranker.score(QUERY, TEXTS, budget_s=budget_s)
    known = np.isfinite(scores)
    count = int(known.sum())
    assert FIRST_TEXTS <= count < len(TEXTS)
    assert known[:count].all()
    assert np.allclose(scores[:count], expected[:count], rtol=0, atol=1e-5)
    assert clock.now <= max(budget_s, FIRST_TEXTS * max(clock.batches[0]))
    one_more = len(reranker._scoring.read(QUERY, TEXTS[count : count + 1])[0].ids)
    assert clock.now + one_more > budget_s
    assert max(map(len, clock.batches)) <= BLOCK_TEXTS
    assert rerank(scores)[count:].tolist() == list(range(count, len(TEXTS)))


def test_enough_time_scores_all_and_none_scores_nothing(reranker, expected):
    clock = Clock(reranker)
    assert np.allclose(reranker.score(QUERY, TEXTS, budget_s=1e6), expected, rtol=0, atol=1e-5)
    clock.batches.clear()
    assert np.isnan(reranker.score(QUERY, TEXTS, budget_s=0.0)).all()
    assert not clock.batches


def test_batches_are_of_like_lengths_within_the_budget(reranker):
    clock = Clock(reranker)
    reranker.score(QUERY, TEXTS * 4)
    real = sum(map(sum, clock.batches))
    assert len(clock.batches) > 1
    assert all(len(batch) * max(batch) <= 1024 for batch in clock.batches)
    assert clock.now < 1.1 * real


def test_text_that_does_not_fit_into_memory_keeps_its_place(reranker, expected):
    forward = reranker._scoring.score

    def small(batch):
        if len(batch) * len(batch[0].ids) > 100:
            raise torch.OutOfMemoryError
        return forward(batch)

    reranker._scoring.score = small
    scores = reranker.score(QUERY, TEXTS)
    lost = np.isnan(scores)
    assert lost.tolist() == [len(pair.ids) > 100 for pair in reranker._scoring.read(QUERY, TEXTS)]
    assert 0 < lost.sum() < len(TEXTS)
    assert np.allclose(scores[~lost], expected[~lost], rtol=0, atol=1e-5)


def test_score_that_is_not_finite_is_none(reranker):
    weights = reranker._scoring._model.get_parameter("0.model.bert.embeddings.word_embeddings.weight")
    weights.data[reranker._scoring.read("zebra", [""])[0].ids[1]] = float("nan")
    assert np.isnan(reranker.score(QUERY, ["a", "zebra", "b"])).tolist() == [False, True, False]


@pytest.fixture(scope="module")
def pairs(folder):
    return PairTokenizer(folder, 32), AutoTokenizer.from_pretrained(str(folder))


@pytest.mark.parametrize("query", ["", "one", "one two three four five six seven eight nine ten"])
def test_only_the_text_is_cut(pairs, query):
    tokenizer, theirs = pairs
    for text in ("", "short", "harbour lighthouse " * 50):
        (ours,) = tokenizer(query, [text])
        cut = theirs([query], [text], truncation="only_second", max_length=32)
        assert ([ours.ids], [ours.types]) == (cut["input_ids"], cut["token_type_ids"])
        assert len(ours.ids) <= 32


def test_endless_query_leaves_the_text_a_quarter(pairs):
    tokenizer, _ = pairs
    long, short = tokenizer("harbour " * 500, ["lighthouse " * 5000, "a"])
    assert len(long.ids) == 32
    assert (long.types.count(0), long.types.count(1)) == (1 + 21 + 1, 8 + 1)
    assert short.types.count(0) == 1 + 21 + 1


def test_text_that_spells_out_a_special_token_has_none(pairs):
    tokenizer, theirs = pairs
    (ours,) = tokenizer("a [SEP] b", ["c [SEP] d [CLS]"])
    assert ours.ids.count(theirs.sep_token_id) == 2
    assert ours.ids.count(theirs.cls_token_id) == 1


def test_max_tokens_cuts_as_sentence_transformers_does(folder):
    model = CrossEncoder(str(folder), device="cpu", max_length=40)
    reranker = load_reranker(str(folder), max_tokens=40, precision="fp32")
    assert reranker.max_tokens == 40
    assert np.allclose(reranker.score(QUERY, TEXTS), model.predict([(QUERY, text) for text in TEXTS]), rtol=0, atol=1e-5)
    for wrong in (15, 161):
        with pytest.raises(ConfigError, match=rf"search.reranker: {wrong} tokens .* has 160 positions"):
            load_reranker(str(folder), max_tokens=wrong)


def test_another_number_of_outputs_is_refused(tmp_path, minilm):
    with pytest.raises(ConfigError, match=r"search.reranker: .*found 2 outputs, expected one"):
        load_reranker(str(save_model(tmp_path, minilm[1].path, outputs=2)))


def test_encoders_are_refused(tmp_path, minilm):
    with pytest.raises(ConfigError, match="found SentenceTransformer, expected a CrossEncoder"):
        load_reranker(MINILM)
    SentenceTransformer(str(minilm[1].path), device="cpu").save(str(tmp_path / "saved"))
    with pytest.raises(ConfigError, match="found SentenceTransformer, expected a CrossEncoder"):
        load_reranker(str(tmp_path / "saved"))
    BertModel(BertConfig(**SIZES)).save_pretrained(str(tmp_path / "bare"))
    with pytest.raises(ConfigError, match="found BertModel, expected a CrossEncoder"):
        load_reranker(str(tmp_path / "bare"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"found no config\.json with architectures"):
        load_reranker(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no/such", "search.reranker: no/such: a hub model needs search.reranker_revision"),
        ("nowhere", "search.reranker: nowhere: no such folder"),
        ("package:no_such_package/model", "search.reranker: .* pip install it"),
    ],
)
def test_missing_model_says_what_to_do(model, message):
    with pytest.raises(ConfigError, match=message):
        load_reranker(model)


def test_files_of_a_model_are_data(tmp_path, minilm):
    folder = save_model(tmp_path, minilm[1].path)
    with pytest.raises(ConfigError, match="only from a pinned commit"):
        load_reranker(str(folder), trust_remote_code=True)
    config = folder / "config.json"
    plain = config.read_text()
    config.write_text(json.dumps(json.loads(plain) | {"auto_map": {"AutoModel": "some/code--modeling.Model"}}))
    with pytest.raises(EncoderError, match="is code of another repository"):
        load_reranker(str(folder), "a" * 40, trust_remote_code=True)
    config.write_text(plain)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(EncoderError, match=r"no \.safetensors weights"):
        load_reranker(str(folder))


def test_tokenizer_of_another_model_is_refused(tmp_path, minilm):
    folder = save_model(tmp_path, minilm[1].path)
    file = folder / "tokenizer.json"
    settings = json.loads(file.read_text())
    settings["post_processor"] = None
    reranked = load_reranker(str(folder))
    file.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"reads other tokens than its tokenizer\.json gives"):
        CrossEncoding(reranked._scoring._model, folder, 128, "fp32")


@given(
    st.lists(st.sampled_from((float("nan"), -np.inf, -1.5, -0.0, 0.0, 0.25, 3.0, np.inf)) | st.floats(width=32), max_size=60)
)
def test_rerank_puts_the_scored_first_and_keeps_the_rest(scores):
    scored = [row for row, score in enumerate(scores) if not np.isnan(score)]
    expected = sorted(scored, key=lambda row: (-scores[row], row))
    expected += [row for row, score in enumerate(scores) if np.isnan(score)]
    order = rerank(np.array(scores, dtype=np.float32))
    assert order.dtype == np.int64
    assert order.tolist() == expected


def test_revision_needs_a_reranker():
    minimal = {"root": "/tmp/root", "corpus": {"uri": "/tmp/corpus"}}
    with pytest.raises(ConfigError, match=r"set search\.reranker too"):
        parse_config(minimal | {"search": {"reranker_revision": "a" * 40}})
    search = parse_config(minimal | {"search": {"reranker": "own/model", "reranker_revision": "a" * 40}}).search
    assert (search.rerank_depth, search.rerank_ms) == (50, None)


class Slow:
    """A re-ranker that takes no time and remembers how much it was given."""

    def __init__(self):
        self.budgets = []

    def score(self, query, texts, *, budget_s):
        self.budgets.append(budget_s)
        return np.full(len(texts), np.nan if budget_s is not None and budget_s <= 0 else 1.0, dtype=np.float32)


def test_the_wait_for_others_is_part_of_the_time_that_is_given():
    reranking, found = Reranking(SearchConfig(reranker="any")), [FoundText(1, 0.5, "a", ())]
    reranking._reranker = slow = Slow()
    with ThreadPoolExecutor(1) as pool:
        with reranking._lock:
            late = pool.submit(reranking.order, "q", found, 1, 0.05)
            time.sleep(0.2)
        assert "rerank" not in late.result()[0].scores
    assert slow.budgets[0] <= 0
    assert reranking.order("q", found, 1)[0].scores["rerank"] == 1
    assert slow.budgets[1] is None
