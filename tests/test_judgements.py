import gzip

import pytest

from pipeline.config import StoreConfig
from pipeline.errors import ConfigError
from pipeline.search.judgements import read_qrels, read_queries

QUERY = '{"_id": "q", "text": "what? \u00e9"}\n'


def test_judgements_of_both_forms_with_and_without_a_header(tmp_path):
    (tmp_path / "beir.tsv").write_text('query-id\tcorpus-id\tscore\r\nq"1\td1\t1\r\n\r\nq"1\td"2\t0\r\n')
    assert read_qrels(str(tmp_path / "beir.tsv"), StoreConfig()) == {'q"1': {"d1": 1, 'd"2': 0}}
    (tmp_path / "trec.tsv").write_text("q\t0\td1\t2\n")
    assert read_qrels(str(tmp_path / "trec.tsv"), StoreConfig()) == {"q": {"d1": 2}}
    (tmp_path / "bad.tsv").write_text("q\td\t1\nq\td\tmuch\n")
    with pytest.raises(ConfigError, match=r"bad\.tsv: line 2 is no judgement"):
        read_qrels(str(tmp_path / "bad.tsv"), StoreConfig())


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", QUERY.encode("utf-16")),
        ("a.jsonl", QUERY.encode("latin-1")),
        ("a.jsonl.gz", QUERY.encode()),
        ("a.jsonl.gz", gzip.compress(QUERY.encode(), mtime=0)[:-9]),
    ],
    ids=["utf-16", "latin-1", "plain", "cut"],
)
def test_a_file_that_is_no_text_or_no_gzip_is_named(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    for read in (read_queries, read_qrels):
        with pytest.raises(ConfigError, match=rf"{name}: not UTF-8, or not gzip"):
            read(str(tmp_path / name), StoreConfig())
