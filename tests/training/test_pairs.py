"""Training pairs as Parquet, and out of a corpus that nobody has judged."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ConfigError
from pipeline.training.pairs import Pair, corpus_pairs, read_pairs, write_pairs
from tests.conftest import make_config, write_jsonl

PAIR = {"query": "who wrote it?", "positive": "She wrote it."}


def config_of(tmp_path, **corpus):
    return make_config(tmp_path / "root", tmp_path / "corpus", corpus=corpus)


def test_pairs_come_back_as_they_were_written(tmp_path):
    pairs = [
        Pair("a query", "its answer", ("no answer", "none either"), (2.0, 1.0, -0.5), "q1", "judgements"),
        Pair("another", "its own"),
    ]
    write_pairs(str(tmp_path / "pairs.parquet"), pairs, config_of(tmp_path))
    assert read_pairs(str(tmp_path / "pairs.parquet"), config_of(tmp_path)) == pairs


def test_pairs_of_a_users_own_need_only_query_and_positive(tmp_path):
    pq.write_table(pa.table({"positive": ["p"], "query": ["q"], "mine": [1]}), tmp_path / "own.parquet")
    assert read_pairs(str(tmp_path / "own.parquet"), config_of(tmp_path)) == [Pair("q", "p")]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"query": ["q"]}, "no column positive, found query"),
        ({"query": ["q", " "], "positive": ["p", "p"]}, "row 1 has no query"),
        ({"query": ["q"], "positive": pa.array([None], pa.string())}, "row 0 has no positive"),
        ({"query": [1], "positive": [b"\xff"]}, "other types than those of training pairs"),
        ({"query": ["q"], "positive": ["p"], "negatives": [["n", ""]]}, "row 0 has an empty negative"),
        (
            {"query": ["q"], "positive": ["p"], "negatives": [["n"]], "scores": [[1.0]]},
            "row 0 has 1 scores for a positive and 1",
        ),
        (
            {"query": ["q"], "positive": ["p"], "negatives": [["n"]], "scores": [[1.0, float("nan")]]},
            "row 0 has a score that is no number",
        ),
        ({"query": pa.array([], pa.string()), "positive": pa.array([], pa.string())}, "no pairs"),
    ],
)
def test_what_is_wrong_with_pairs_is_named(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "pairs.parquet")
    with pytest.raises(ConfigError, match=rf"pairs\.parquet: {message}"):
        read_pairs(str(tmp_path / "pairs.parquet"), config_of(tmp_path))


def test_no_file_and_no_parquet_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_pairs(str(tmp_path / "pairs.parquet"), config_of(tmp_path))
    (tmp_path / "pairs.parquet").write_text("query\tpositive\n")
    with pytest.raises(ConfigError, match="no Parquet file"):
        read_pairs(str(tmp_path / "pairs.parquet"), config_of(tmp_path))


ALL = {"a", "b", "c"}
ROWS = [
    {"id": "a", "title": "The harbour at night", "text": "Ships lie still. Nobody walks on the long pier."},
    {"id": "b", "title": "", "text": "Only one sentence that goes on without an end"},
    {"id": "c", "title": "Too short", "text": "It rained. It rained all week and nobody went out."},
]


def test_titles_ask_for_their_texts(tmp_path):
    write_jsonl(tmp_path / "corpus" / "a.jsonl", ROWS)
    (pair,) = corpus_pairs(config_of(tmp_path, title="title"), "title", 100, ALL, 0)
    assert (pair.query, pair.positive, pair.doc_id) == (ROWS[0]["title"], ROWS[0]["text"], "a")
    assert pair.source == f"title of {tmp_path / 'corpus'}"


def test_first_sentences_ask_for_the_rest(tmp_path):
    write_jsonl(tmp_path / "corpus" / "a.jsonl", ROWS)
    found = corpus_pairs(config_of(tmp_path, title="title"), "sentence", 100, ALL, 0)
    assert [(pair.query, pair.positive) for pair in found] == [("Ships lie still.", "Nobody walks on the long pier.")]


def test_a_corpus_without_titles_says_so(tmp_path):
    write_jsonl(tmp_path / "corpus" / "a.jsonl", ROWS)
    with pytest.raises(ConfigError, match=r"no pair from a title; set corpus\.title"):
        corpus_pairs(config_of(tmp_path), "title", 100, ALL, 0)


def test_pairs_of_a_corpus_are_a_sample_of_what_counts(tmp_path):
    rows = [
        {"id": f"d{row}", "title": f"The title of number {row}", "text": f"The text of number {row}."} for row in range(200)
    ]
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows)
    config, live = config_of(tmp_path, title="title"), {f"d{row}" for row in range(150)}
    found = [{pair.doc_id for pair in corpus_pairs(config, "title", 30, live, seed)} for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert all(len(ids) == 30 and ids <= live for ids in found)
    assert max(int(doc_id[1:]) for doc_id in found[0]) > 100
    assert len(corpus_pairs(config, "title", 1000, live, 0)) == 150
