"""The loop on a small corpus: pairs from judgements, negatives from the live artifact, models trained and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from pipeline.artifacts.live import open_live
from pipeline.client import Artifact
from pipeline.encoder import Encoder, load_query_encoder
from pipeline.encoding.model import resolve_spec
from pipeline.errors import BadFileError, ConfigError
from pipeline.run import reindex
from pipeline.search.reranker import load_reranker
from pipeline.training.distillation import taught
from pipeline.training.mining import Mining, judged_pairs, mine
from pipeline.training.pairs import Pair, corpus_pairs, read_pairs, write_pairs
from pipeline.training.recipe import LOG, Recipe, plan_training
from pipeline.training.rows import with_negatives
from pipeline.training.trainer import train
from tests.conftest import MINILM, TOPICS, make_config, save_first_layer, sentences, start_ray, write_jsonl

pytestmark = pytest.mark.usefixtures("local_ray")

RECIPE = Recipe(epochs=2, batch=8, learning_rate=5e-4, max_tokens=32)
QUERIES = {f"q{number}": f"What is written on {TOPICS[number]}s?" for number in range(8)}
QRELS = {f"q{number}": {f"d{number}": 1, f"d{number + 10}": 1, f"d{number + 20}": 0} for number in range(8)}


@pytest.fixture(scope="module")
def root(tmp_path_factory, short_tmp):
    start_ray(short_tmp)
    folder = tmp_path_factory.mktemp("loop")
    save_first_layer(folder / "small")
    long = {"id": "long", "text": "The lighthouse keeper sleeps. " * 60 + "A violin lies in the attic of the tower."}
    write_jsonl(folder / "corpus" / "a.jsonl", [*sentences(100), long])
    config = make_config(folder / "root", folder / "corpus", encoder={"model": str(folder / "small")})
    reindex(config)
    return config


@pytest.fixture(scope="module")
def pairs(root):
    opened = open_live(root)
    artifact = Artifact(opened, root)
    found = judged_pairs(artifact, opened.partition.documents, QUERIES, QRELS, "test")
    return mine(artifact, found, Mining(negatives=3, depth=10, max_share=0.99), QRELS).pairs


def test_judgements_give_a_pair_for_each_relevant_document(pairs):
    texts = {row["id"]: row["text"] for row in sentences(100)}
    expected = {(QUERIES[f"q{number}"], texts[f"d{doc}"]) for number in range(8) for doc in (number, number + 10)}
    assert {(pair.query, pair.positive) for pair in pairs} == expected
    assert {pair.source for pair in pairs} == {"test"}


def test_a_long_document_answers_with_its_nearest_passage(root):
    opened = open_live(root)
    artifact = Artifact(opened, root)
    qrels = {"q": {"long": 1, "no such document": 1}}
    (pair,) = judged_pairs(artifact, opened.partition.documents, {"q": "a violin in an attic"}, qrels, "test")
    assert "violin" in pair.positive
    with pytest.raises(ConfigError, match="has none of the relevant documents"):
        judged_pairs(artifact, opened.partition.documents, {"q": "a violin"}, {"q": {"no such document": 1}}, "test")


def test_negatives_are_near_and_no_answers(root, pairs):
    artifact = Artifact(open_live(root), root)
    texts = {row["text"]: row["id"] for row in sentences(100)}
    for pair in pairs:
        vectors = artifact.encode_documents([pair.positive, *pair.negatives])
        cosines = vectors @ artifact.encode([pair.query])[0]
        assert (cosines[1:] <= 0.99 * cosines[0] + 1e-3).all()
        assert len(set(pair.negatives)) == len(pair.negatives)
        assert not {texts.get(text) for text in pair.negatives} & {doc for doc, grade in QRELS[pair.query_id].items() if grade}


def test_mining_is_repeatable_and_counts_what_it_skips(root, pairs):
    artifact = Artifact(open_live(root), root)
    bare = [replace(pair, negatives=()) for pair in pairs]
    again = mine(artifact, bare, Mining(negatives=3, depth=10, max_share=0.99), QRELS)
    assert again.pairs == pairs
    assert again.too_near > 0
    strict = mine(artifact, bare, Mining(negatives=3, depth=10, max_share=0.0), QRELS)
    assert strict.fewer == len(pairs)
    other = mine(artifact, bare, Mining(negatives=3, depth=10, max_share=0.99, seed=5), QRELS)
    assert other.pairs != pairs


def test_a_trained_encoder_is_nearer_to_its_answers_and_an_encoder_like_any(root, pairs, tmp_path):
    trained = train(plan_training("encoder", root, pairs, RECIPE, tmp_path / "model"))
    assert (trained.steps, trained.resumed) == (4, 0)
    assert [step for step, _ in trained.losses] == [1, 2, 3, 4]
    assert not (tmp_path / "model.training").exists()
    assert resolve_spec(model=str(tmp_path / "model"))[0].max_tokens == resolve_spec(model=root.encoder.model)[0].max_tokens
    before, after = (margins(load(model), pairs) for model in (root.encoder.model, str(tmp_path / "model")))
    assert after.mean() > before.mean() + 0.05
    log = [json.loads(line) for line in (tmp_path / "model" / LOG).read_text().splitlines()]
    assert log[0]["sources"] == ["test"] and log[0]["pairs"] == len(pairs)
    assert [line["step"] for line in log[1:]] == [1, 2, 3, 4]
    assert train(plan_training("encoder", root, pairs, RECIPE, tmp_path / "model")).losses == trained.losses
    with pytest.raises(ConfigError, match="exists, and is not of this training"):
        train(plan_training("encoder", root, pairs, replace(RECIPE, seed=9), tmp_path / "model"))


def load(model):
    return load_query_encoder(resolve_spec(model=model)[0])


def margins(encoder: Encoder, pairs: list[Pair]) -> np.ndarray:
    """Cosine of each answer above that of its nearest negative, (n,), of the pairs that have some."""
    pairs = [pair for pair in pairs if pair.negatives]
    assert len(pairs) >= 8
    queries = encoder.encode_queries([pair.query for pair in pairs])
    answers = encoder.encode_documents([pair.positive for pair in pairs])
    wrong = [encoder.encode_documents(list(pair.negatives)) for pair in pairs]
    best = np.array([(vectors @ query).max() for vectors, query in zip(wrong, queries, strict=True)])
    return (queries * answers).sum(axis=1) - best


def test_matryoshka_training_keeps_order_in_few_dimensions(root, pairs, tmp_path):
    train(plan_training("encoder", root, pairs, replace(RECIPE, dims=(32,)), tmp_path / "model"))
    short = [
        margins(load_query_encoder(resolve_spec(model=model, dim=32)[0]), pairs)
        for model in (root.encoder.model, str(tmp_path / "model"))
    ]
    assert short[1].mean() > short[0].mean() + 0.05
    with pytest.raises(ConfigError, match=r"dims: \(512,\), but .* has 384 dimensions"):
        train(plan_training("encoder", root, pairs, replace(RECIPE, dims=(512,)), tmp_path / "other"))


PROGRAM = """
import json, sys
from pathlib import Path
from pipeline.config_file import parse_config
from pipeline.training.pairs import read_pairs
from pipeline.training.recipe import Recipe, plan_training
from pipeline.training.trainer import train
config = parse_config(json.loads(sys.argv[1]))
recipe = Recipe(epochs=24, batch=8, learning_rate=5e-5, max_tokens=32)
train(plan_training("encoder", config, read_pairs(sys.argv[2], config), recipe, Path(sys.argv[3])))
"""


def test_a_killed_training_goes_on_from_its_checkpoint_to_the_same_model(root, pairs, tmp_path):
    write_pairs(str(tmp_path / "pairs.parquet"), pairs, root)
    settings = json.dumps({"root": root.root, "corpus": {"uri": root.corpus.uri}, "encoder": {"model": root.encoder.model}})
    recipe = Recipe(epochs=24, batch=8, learning_rate=5e-5, max_tokens=32)
    stored = read_pairs(str(tmp_path / "pairs.parquet"), root)
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, settings, str(tmp_path / "pairs.parquet"), str(tmp_path / "cut")]
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "cut.training" / "checkpoints").glob("checkpoint-*/trainer_state.json")):
        assert program.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(program.pid, signal.SIGKILL)
    program.wait()
    assert not (tmp_path / "cut").exists()
    with pytest.raises(ConfigError, match="the checkpoints of another training"):
        train(plan_training("encoder", root, stored, replace(recipe, epochs=3), tmp_path / "cut"))
    resumed = train(plan_training("encoder", root, stored, recipe, tmp_path / "cut"))
    whole = train(plan_training("encoder", root, stored, recipe, tmp_path / "whole"))
    assert 0 < resumed.resumed < resumed.steps == whole.steps == 48
    assert dict(resumed.losses) == pytest.approx(dict(whole.losses), rel=1e-3)
    texts = [pair.positive for pair in pairs]
    ours, theirs = (load(str(tmp_path / name)).encode_documents(texts) for name in ("cut", "whole"))
    assert (ours * theirs).sum(axis=1).min() > 0.9999


def test_accumulating_is_the_same_batch(root, pairs, tmp_path):
    bare = [replace(pair, negatives=pair.negatives[:1]) for pair in pairs]
    losses = [
        dict(train(plan_training("reranker", root, bare, replace(RECIPE, accumulate=count), tmp_path / str(count))).losses)
        for count in (1, 2)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    with pytest.raises(ConfigError, match="batch: 8 pairs are no multiple of 1 workers x 3"):
        train(plan_training("reranker", root, bare, replace(RECIPE, accumulate=3), tmp_path / "3"))


def test_a_trained_cross_encoder_ranks_and_teaches(root, pairs, tmp_path):
    recipe = replace(RECIPE, epochs=6)
    train(plan_training("reranker", root, pairs, recipe, tmp_path / "reranker"))
    reranker = load_reranker(str(tmp_path / "reranker"))
    assert reranker.max_tokens == 32
    hard = [pair for pair in pairs if pair.negatives]
    ranked = [reranker.score(pair.query, [pair.positive, *pair.negatives]) for pair in hard]
    assert np.mean([scores[0] > scores[1:].max() for scores in ranked]) > 0.7
    config = root.model_copy(update={"search": root.search.model_copy(update={"reranker": str(tmp_path / "reranker")})})
    scored = taught(hard, config)
    assert scored[0].scores == pytest.approx(ranked[0].tolist(), abs=0.05)
    train(plan_training("distilled", root, scored, replace(recipe, epochs=3), tmp_path / "student"))
    before, after = (agreement(load(model), scored) for model in (root.encoder.model, str(tmp_path / "student")))
    assert after > before + 0.2


def test_a_model_of_late_interaction_ranks_untrained_and_better_trained(root, pairs, tmp_path):
    short = replace(RECIPE, epochs=0.25, learning_rate=1e-9)
    train(plan_training("late", root, pairs, short, tmp_path / "as-it-is"))
    trained = train(plan_training("late", root, pairs, replace(RECIPE, epochs=6), tmp_path / "late"))
    first, last = ([loss for _, loss in trained.losses[part]] for part in (slice(4), slice(-4, None)))
    assert np.mean(last) < 0.9 * np.mean(first)
    hard = [pair for pair in pairs if pair.negatives]
    before, after = (late_margin(load_reranker(str(tmp_path / name)), hard) for name in ("as-it-is", "late"))
    assert after > before + 0.05
    again = train(plan_training("late", root, pairs, short, tmp_path / "further", str(tmp_path / "late")))
    assert late_margin(load_reranker(str(again.out)), hard) == pytest.approx(after, abs=0.02)
    assert load_reranker(str(again.out)).max_tokens == load_reranker(str(tmp_path / "as-it-is")).max_tokens > RECIPE.max_tokens


def late_margin(reranker, pairs: list[Pair]) -> float:
    """How far the answer is above its nearest negative, as a share of its score, on average."""
    ranked = [reranker.score(pair.query, [pair.positive, *pair.negatives]) for pair in pairs]
    return float(np.mean([(scores[0] - scores[1:].max()) / scores[0] for scores in ranked]))


def agreement(encoder: Encoder, pairs: list[Pair]) -> float:
    """Correlation of an encoder's margins between answers and negatives with those of the teacher."""
    margins = []
    for pair in pairs:
        query = encoder.encode_queries([pair.query])[0]
        answer, *wrong = encoder.encode_documents([pair.positive, *pair.negatives]) @ query
        margins += [(answer - each, pair.scores[0] - score) for each, score in zip(wrong, pair.scores[1:], strict=True)]
    return float(np.corrcoef(np.array(margins).T)[0, 1])


def test_training_without_negatives_or_scores_says_so(root, pairs, tmp_path):
    bare = [replace(pair, negatives=()) for pair in pairs]
    for kind in ("reranker", "distilled"):
        with pytest.raises(ConfigError, match="none has a negative"):
            train(plan_training(kind, root, bare, RECIPE, tmp_path / kind))
    with pytest.raises(ConfigError, match="negatives: a cross-encoder learns an answer only beside others"):
        plan_training("reranker", root, pairs, replace(RECIPE, negatives=0), tmp_path / "none")
    with pytest.raises(ConfigError, match="rerank: the config names no re-ranker"):
        taught(pairs, root)


def test_pairs_lacking_negatives_get_other_texts_and_never_their_own_answers(root, tmp_path):
    few = [Pair("one", "a", ("b",)), Pair("two", "b", ())]
    with pytest.raises(ConfigError, match="too few texts for 1 negatives of 'two'"):
        with_negatives([*few, Pair("two", "a", ())], RECIPE)
    filled = with_negatives([*few, Pair("three", "c", ())], replace(RECIPE, negatives=1))
    assert filled[0][1] == ["b"]
    for pair, negatives in filled:
        assert len(negatives) == 1 and pair.positive not in negatives


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": {"query_model": MINILM}}, r"encoder\.query_model: pairs train one model for both sides"),
        ({"recipe": {"max_tokens": 10_000}}, r"max_tokens: 10000, but .* has 512 positions"),
        ({"recipe": {"dims": (0,)}}, r"dims: \(0,\), but"),
        ({"model": "some/model"}, "--model: some/model: a hub model needs to be a folder here"),
    ],
)
def test_what_cannot_be_trained_is_told_before_anything_is_written(root, pairs, tmp_path, change, message):
    config = root.model_copy(update={"encoder": root.encoder.model_copy(update=change.get("encoder", {}))})
    with pytest.raises(ConfigError, match=message):
        plan_training(
            "encoder", config, pairs, replace(RECIPE, **change.get("recipe", {})), tmp_path / "m", change.get("model")
        )
    assert not list(tmp_path.iterdir())


def test_negatives_of_a_corpus_without_judgements_are_shown_as_its_answers_are(root):
    artifact = Artifact(open_live(root), root)
    rows = sentences(40)
    found = [Pair(f"Which note is number {row}?", f"Shown {row}.", query_id=f"d{row}", doc_id=f"d{row}") for row in range(40)]
    shown = {pair.doc_id: pair.positive for pair in found}
    mined = mine(artifact, found, Mining(negatives=2, depth=5, max_share=1.0), None, shown)
    assert any(pair.negatives for pair in mined.pairs)
    for pair in mined.pairs:
        assert pair.positive not in pair.negatives and set(pair.negatives) <= set(shown.values())
    assert len(rows) == len(mined.pairs)


def test_pairs_come_from_a_corpus_whose_bad_file_was_skipped(tmp_path):
    write_jsonl(tmp_path / "corpus" / "a.jsonl", [{"id": "a", "text": "The harbour is cold. It freezes over every winter."}])
    (tmp_path / "corpus" / "b.jsonl.gz").write_bytes(b"not gzip")
    config = make_config(tmp_path / "root", tmp_path / "corpus", corpus={"on_error": "skip_file"})
    (pair,) = corpus_pairs(config, "sentence", 10, {"a"}, seed=0)
    assert (pair.query, pair.positive) == ("The harbour is cold.", "It freezes over every winter.")
    with pytest.raises(BadFileError, match=r"b\.jsonl\.gz: E_COMPRESSION"):
        corpus_pairs(make_config(tmp_path / "root", tmp_path / "corpus"), "sentence", 10, {"a"}, seed=0)
