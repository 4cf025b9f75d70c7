"""Artifacts compared on judged queries: the numbers, what chance explains, the page."""

import json

import numpy as np
import pytest

from pipeline.artifacts.live import open_live
from pipeline.errors import ConfigError
from pipeline.reports.comparison import Comparison, compare, randomization_test
from pipeline.reports.report import render_comparison
from pipeline.run import reindex
from pipeline.search.evaluation import labelled
from tests.conftest import TOPICS, make_config, sentences, start_ray, write_jsonl


@pytest.fixture(scope="module")
def judged(tmp_path_factory, short_tmp):
    """Two artifacts of one corpus, the second with half of each text, and queries that are judged."""
    start_ray(short_tmp)
    folder = tmp_path_factory.mktemp("compared")
    rows = sentences(100)
    write_jsonl(folder / "whole" / "a.jsonl", rows)
    write_jsonl(folder / "half" / "a.jsonl", [row | {"text": row["text"].partition(" and ")[0]} for row in rows])
    for name in ("whole", "half"):
        config = make_config(folder / f"{name}-root", folder / name, evaluation={"sample": 20})
        (folder / f"{name}.yaml").write_text(json.dumps({"root": config.root, "corpus": {"uri": config.corpus.uri}}))
        reindex(config)
    queries = [
        {"_id": f"q{one}{two}", "text": f"the {TOPICS[one]} and the {TOPICS[two]}"} for one in range(10) for two in range(3)
    ]
    write_jsonl(folder / "queries.jsonl", [*queries, {"_id": "unjudged", "text": "nobody knows"}])
    lines = [f"q{one}{two}\td{10 * two + one}\t1" for one in range(10) for two in range(3)]
    (folder / "qrels.tsv").write_text("\n".join(lines) + "\n")
    return folder


def test_compare_measures_each_artifact_as_evaluate_does(judged):
    found = compare(
        [str(judged / "whole.yaml"), str(judged / "half.yaml")], str(judged / "queries.jsonl"), str(judged / "qrels.tsv")
    )
    assert (found.queries, found.mode) == (30, "as configured")
    whole, half = found.artifacts
    config = make_config(judged / "whole-root", judged / "whole")
    opened = open_live(config)
    files = str(judged / "queries.jsonl"), str(judged / "qrels.tsv")
    expected = labelled(opened.searcher, opened.spec, *files, config.store)["index"]
    assert whole.metrics == pytest.approx(expected, abs=1e-4)
    assert (whole.documents, whole.dim, whole.artifact) == (100, 384, opened.manifest.version)
    assert whole.bytes_per_vector > 384
    (ndcg,) = (each for each in found.differences if each.metric == "ndcg@10")
    assert ndcg.mean == pytest.approx(half.metrics["ndcg@10"] - whole.metrics["ndcg@10"], abs=2e-4)
    assert ndcg.mean < -0.3 and ndcg.p < 0.001
    assert ndcg.wins + ndcg.losses + ndcg.ties == 30
    worst = ndcg.most_worse[0]
    assert worst.before - worst.after == max(each.before - each.after for each in ndcg.most_worse) > 0
    page = render_comparison(found).decode()
    assert "2 artifacts on 30 judged queries" in page and worst.text in page and "<svg" in page
    assert Comparison.model_validate_json(found.model_dump_json()) == found


def test_an_artifact_differs_from_itself_by_nothing(judged):
    config = make_config(judged / "whole-root", judged / "whole")
    uri = f"{config.root}/artifacts/{open_live(config).manifest.version}"
    found = compare([uri, uri], str(judged / "queries.jsonl"), str(judged / "qrels.tsv"), mode="dense")
    assert {(each.mean, each.p, each.wins, each.losses) for each in found.differences} == {(0.0, 1.0, 0, 0)}


def test_compare_without_judged_queries_says_so(judged):
    (judged / "other.tsv").write_text("q\td\t1\n")
    with pytest.raises(ConfigError, match="no query that is judged"):
        compare([str(judged / "whole.yaml")] * 2, str(judged / "queries.jsonl"), str(judged / "other.tsv"))


def test_randomization_test_is_exact_where_it_can_be_counted():
    assert randomization_test(np.ones(5)) == pytest.approx(2 / 32, abs=0.01)  # all signs equal: 2 of 2^5
    assert randomization_test(np.array([1.0, -1.0])) == 1.0
    rng = np.random.default_rng(0)
    under_null = [randomization_test(rng.normal(size=40)) for _ in range(40)]
    assert 0.3 < np.mean(under_null) < 0.7
