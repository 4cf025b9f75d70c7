"""What bytes buy: every compression of a live artifact, on the page and as numbers."""

import json

import numpy as np
import pytest

from pipeline.artifacts.live import open_live
from pipeline.reports.compression import KINDS, Compression, compress
from pipeline.reports.report import render_compression
from pipeline.run import reindex
from pipeline.search.evaluation import labelled
from tests.conftest import TOPICS, make_config, sentences, start_ray, write_jsonl
from tests.e2e.test_cli import vecmill


@pytest.fixture(scope="module")
def folder(tmp_path_factory, short_tmp):
    start_ray(short_tmp)
    folder = tmp_path_factory.mktemp("compressed")
    rows = [row | {"text": f"{row['text']} It has {number % 7} pages."} for number, row in enumerate(sentences(600))]
    write_jsonl(folder / "corpus" / "a.jsonl", rows)
    write_jsonl(
        folder / "queries.jsonl", [{"_id": f"q{row}", "text": f"the {TOPICS[row]} and the harbour"} for row in range(10)]
    )
    (folder / "qrels.tsv").write_text("".join(f"q{row}\td{row + 100 * more}\t1\n" for row in range(10) for more in range(3)))
    reindex(config_of(folder))
    return folder


def config_of(folder, **sections):
    judged = {"queries": str(folder / "queries.jsonl"), "qrels": str(folder / "qrels.tsv"), "sample": 60}
    return make_config(folder / "root", folder / "corpus", evaluation=judged, **sections)


@pytest.fixture(scope="module")
def found(folder):
    return compress(config_of(folder))


def test_exact_search_is_that_of_evaluate_and_fewer_dimensions_are_worse(folder, found):
    config = config_of(folder)
    opened = open_live(config)
    expected = labelled(opened.searcher, opened.spec, config.evaluation.queries, config.evaluation.qrels, config.store)
    assert found.exact[384] == pytest.approx(expected["exact"]["ndcg@10"], abs=0.002)
    assert list(found.exact) == [384, 192, 96]
    assert (found.passages, found.dim, found.queries) == (600, 384, 10)


def test_every_kind_is_measured_with_each_way_to_rescore(found):
    assert len(found.rows) == 3 * 3 * len(KINDS)
    for row in found.rows:
        assert row.memory_bytes >= row.dim * row.bits_per_dimension / 8
        assert row.disk_bytes == {"float16": 2 * row.dim, "none": 0}.get(row.rescore, pytest.approx(row.dim, abs=8))
    by = {(row.kind, row.dim, row.bits_per_dimension, row.rescore): row for row in found.rows}
    assert by["ivfsq8", 384, 8.0, "float16"].recall > 0.95
    for (kind, dim, bits, rescore), row in by.items():
        if rescore == "float16":
            assert row.recall >= by[kind, dim, bits, "none"].recall - 0.02, row
    codes = [by["ivfpq", 384, bits, "none"].recall for bits in (1.0, 2.0, 4.0)]
    assert codes == sorted(codes)


def test_the_best_are_those_that_nothing_as_small_beats(found):
    best = [row for row in found.rows if row.is_best]
    assert 1 <= len(best) < len(found.rows)
    for row in found.rows:
        rivals = [other for other in found.rows if other.memory_bytes <= row.memory_bytes]
        assert not row.is_best or all(other.worth <= row.worth for other in rivals)
    for size in {row.memory_bytes for row in found.rows}:
        worth = max(row.worth for row in found.rows if row.memory_bytes <= size)
        assert worth in {row.worth for row in best if row.memory_bytes <= size}  # a tie loses nothing


def test_the_command_writes_a_page_and_commits_nothing(folder, found):
    file = folder / "c.yaml"
    config = config_of(folder)
    settings = {"root": config.root, "corpus": {"uri": config.corpus.uri}, "evaluation": {"sample": 60}}
    file.write_text(json.dumps(settings))
    before = sorted((folder / "root" / "log").iterdir())
    done = vecmill("tune", "-c", file, "--report", folder / "page.html", "--json")
    assert sorted((folder / "root" / "log").iterdir()) == before
    result = json.loads(done.stdout.splitlines()[-1])
    assert {row["quality"] for row in result["rows"]} == {None}
    np.testing.assert_allclose([row["recall"] for row in result["rows"]], [row.recall for row in found.rows], atol=0.02)
    assert "What bytes buy" in (folder / "page.html").read_text()


def test_the_page_shows_every_row(found):
    page = render_compression(found).decode()
    assert page.count('<tr class="over">') == sum(row.is_best for row in found.rows)
    assert page.count("<td>") > 8 * len(found.rows)
    assert Compression.model_validate_json(found.model_dump_json()) == found
