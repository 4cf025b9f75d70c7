"""The loop of the README as commands: mine, train, reindex, compare; from judgements and from a corpus that has none."""

import json

import pytest

from pipeline.training.pairs import read_pairs
from tests.conftest import TOPICS, make_config, sentences, write_jsonl
from tests.e2e.test_cli import vecmill

pytestmark = [pytest.mark.usefixtures("ray_for_programs"), pytest.mark.timeout(600)]


def test_the_loop_of_the_readme_from_mining_to_comparison(tmp_path):
    rows = [row | {"title": f"On the {TOPICS[number % 10]}, number {number}"} for number, row in enumerate(sentences(60))]
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows)
    queries = [{"_id": f"q{number}", "text": f"What do we know of {TOPICS[number]}s?"} for number in range(8)]
    write_jsonl(tmp_path / "queries.jsonl", queries)
    (tmp_path / "qrels.tsv").write_text("".join(f"q{number}\td{number}\t1\n" for number in range(8)))
    judged = ("--queries", tmp_path / "queries.jsonl", "--qrels", tmp_path / "qrels.tsv")
    configs = {name: tmp_path / f"{name}.yaml" for name in ("config", "mine")}
    for name, file in configs.items():
        settings = {"root": str(tmp_path / name), "corpus": {"uri": str(tmp_path / "corpus"), "title": "title"}}
        if name == "mine":
            settings["encoder"] = {"model": str(tmp_path / "models" / "mine")}
            settings["search"] = {"reranker": str(tmp_path / "models" / "reranker"), "rerank_depth": 5}
        file.write_text(json.dumps(settings))

    vecmill("reindex", "-q", "-c", configs["config"])
    mined = json.loads(vecmill("mine", "-c", configs["config"], *judged, "--out", tmp_path / "pairs.parquet", "--json").stdout)
    assert (mined["pairs"], mined["negatives"] + mined["fewer"] > 0) == (8, True)
    quick = ("--pairs", tmp_path / "pairs.parquet", "--batch", "4", "--epochs", "1", "--max-tokens", "24", "--json")
    encoder = ("train-encoder", "-c", configs["config"], "--out", tmp_path / "models" / "mine", *quick)
    first, again = (json.loads(vecmill(*encoder).stdout) for _ in range(2))
    assert first == again and first["steps"] >= 2
    reranker = ("train-reranker", "-c", configs["config"], "--out", tmp_path / "models" / "reranker", *quick)
    assert json.loads(vecmill(*reranker).stdout)["steps"] == 2
    vecmill("reindex", "-q", "-c", configs["mine"])
    student = ("distill", "-c", configs["mine"], "--out", tmp_path / "models" / "student", *quick)
    assert json.loads(vecmill(*student).stdout)["losses"]

    page = tmp_path / "page.html"
    compared = json.loads(vecmill("compare", *configs.values(), *judged, "--rerank", "--html", page, "--json").stdout)
    assert [row["reranked"] for row in compared["artifacts"]] == [False, True]
    assert compared["queries"] == 8 and "2 artifacts on 8 judged queries" in page.read_text()
    assert "may be chance" in vecmill("compare", *configs.values(), *judged).stdout

    titles = vecmill("mine", "-c", configs["config"], "--from", "title", "--limit", "20", "--out", tmp_path / "titles.parquet")
    assert "pairs 20" in titles.stdout
    config = make_config(tmp_path / "config", tmp_path / "corpus", corpus={"title": "title"})
    for pair in read_pairs(str(tmp_path / "titles.parquet"), config):
        assert pair.query.startswith("On the ") and pair.positive.startswith("Note ")
        assert all(text.startswith("Note ") for text in pair.negatives)


def test_commands_that_lack_something_say_what(tmp_path):
    (tmp_path / "c.yaml").write_text(json.dumps({"root": str(tmp_path / "root"), "corpus": {"uri": str(tmp_path / "corpus")}}))
    for command, message in (
        (("train-encoder", "--out", tmp_path / "m"), "give --pairs, or --queries with --qrels"),
        (("train-reranker", "--out", tmp_path / "m", "--pairs", tmp_path / "no.parquet"), "no such file"),
    ):
        done = vecmill(command[0], "-c", tmp_path / "c.yaml", *command[1:], check=False)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
