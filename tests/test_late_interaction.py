"""A model of late interaction as a re-ranker: the scores of sentence-transformers, in our batches and time boxes."""

import numpy as np
import pytest
import torch
from sentence_transformers import MultiVectorEncoder

from pipeline.errors import EncoderError
from pipeline.search.reranker import FIRST_TEXTS, load_reranker, rerank
from tests.conftest import save_first_layer
from tests.test_reranker import QUERY, TEXTS, Clock


def save_late(folder, path, **settings):
    """A MultiVectorEncoder of one layer of MiniLM with a random projection, as sentence-transformers saves it."""
    torch.manual_seed(0)
    save_first_layer(path)
    model = MultiVectorEncoder(str(path), device="cpu", **settings)
    model[1].linear.weight.data.normal_()
    model.save(str(folder))
    return folder


@pytest.fixture(scope="module", params=[{}, {"prompts": {"query": "find: ", "document": "note: "}}], ids=["plain", "prompts"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("late")
    return save_late(path / "model", path / "small", **request.param)


@pytest.fixture(scope="module")
def expected(folder):
    model = MultiVectorEncoder(str(folder), device="cpu")
    scores = model.similarity(model.encode_query([QUERY]), model.encode_document(TEXTS))[0].numpy()
    assert np.ptp(scores) > 0.1
    return scores


@pytest.fixture
def reranker(folder):
    return load_reranker(str(folder), precision="fp32")


def test_scores_equal_those_of_sentence_transformers(reranker, expected):
    scores = reranker.score(QUERY, TEXTS)
    assert (scores.dtype, scores.shape, reranker.max_tokens) == (np.float32, (len(TEXTS),), 256)
    assert np.allclose(scores, expected, rtol=0, atol=1e-4)


def test_order_and_neighbours_do_not_matter(reranker, expected):
    order = np.random.default_rng(0).permutation(len(TEXTS))
    assert np.allclose(reranker.score(QUERY, [TEXTS[row] for row in order]), expected[order], rtol=0, atol=1e-4)


def test_each_query_has_its_own_vectors(reranker, expected):
    other = reranker.score("Who sleeps in the tower?", TEXTS)
    assert not np.allclose(other, expected, atol=0.1)
    assert np.allclose(reranker.score(QUERY, TEXTS), expected, rtol=0, atol=1e-4)


def test_what_is_not_scored_in_time_is_the_end_of_the_ranking(reranker, expected):
    clock = Clock(reranker)
    scores = reranker.score(QUERY, TEXTS, budget_s=400)
    count = int(np.isfinite(scores).sum())
    assert FIRST_TEXTS <= count < len(TEXTS)
    assert np.allclose(scores[:count], expected[:count], rtol=0, atol=1e-4)
    assert clock.now <= 400
    assert rerank(scores)[count:].tolist() == list(range(count, len(TEXTS)))


def test_text_that_spells_out_a_special_token_has_none(reranker, folder):
    tokenizer = MultiVectorEncoder(str(folder), device="cpu").tokenizer
    (read,) = reranker._scoring.read(QUERY, ["a [SEP] b [CLS]"])
    assert (read.ids.count(tokenizer.sep_token_id), read.ids.count(tokenizer.cls_token_id)) == (1, 1)


def test_max_tokens_cut_texts(folder):
    model = MultiVectorEncoder(str(folder), device="cpu")
    model.max_seq_length = 40
    expected = model.similarity(model.encode_query([QUERY]), model.encode_document(TEXTS))[0].numpy()
    assert np.allclose(
        load_reranker(str(folder), max_tokens=40, precision="fp32").score(QUERY, TEXTS), expected, rtol=0, atol=1e-4
    )


def test_words_that_do_not_count_and_expanded_queries_are_those_of_the_model(tmp_path):
    """As ColBERT has them: punctuation of documents is skipped, queries are filled with masks that count."""
    folder = save_late(tmp_path / "model", tmp_path / "small")
    model = MultiVectorEncoder(str(folder), device="cpu")
    model[2].skiplist_words = [",", "."]
    model[0].query_expansion = {"strategy": "fixed", "length": 24}
    model.save(str(tmp_path / "colbert"))
    saved = MultiVectorEncoder(str(tmp_path / "colbert"), device="cpu")
    queries, texts = saved.encode_query([QUERY]), saved.encode_document([*TEXTS, ", . ,"])
    assert len(queries[0]) == 24
    expected = saved.similarity(queries, texts)[0].numpy()
    scores = load_reranker(str(tmp_path / "colbert"), precision="fp32").score(QUERY, [*TEXTS, ", . ,"])
    assert np.allclose(scores, expected, rtol=0, atol=1e-4)


def test_half_precision_gives_nearly_the_same(folder, expected):
    scores = load_reranker(str(folder), precision="bf16").score(QUERY, TEXTS)
    assert np.corrcoef(scores, expected)[0, 1] > 0.99


def test_damaged_weights_are_refused(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(EncoderError, match="cannot be loaded"):
        load_reranker(str(tmp_path / "m"))
