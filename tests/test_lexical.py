import bm25s
import numpy as np
import pytest

from pipeline.errors import ConfigError, VerificationError
from pipeline.operations.planning import make_plan
from pipeline.root.job import plan_job
from pipeline.run import reindex
from pipeline.search.lexical import K1, Analyzer, B, Lexical, write_lexical
from tests.conftest import make_config, sentences

TEXTS = [
    *(row["text"] for row in sentences(300)),
    "The harbour, the harbour and again: the HARBOUR!",
    "",
    "!!!",
    "東京の港は大きい",
    "naïve café déjà",
]


def opened(folder, texts, language="english", block=64):
    write_lexical([texts[first : first + block] for first in range(0, len(texts), block)], language, folder)
    return Lexical(folder, language, len(texts))


def test_scores_are_those_of_bm25s(tmp_path):
    analyzer = Analyzer("english")
    reference = bm25s.BM25(k1=K1, b=B)
    reference.index([analyzer(text) for text in TEXTS], show_progress=False)
    index = opened(tmp_path, TEXTS)
    for query in [*TEXTS[:40], "harbour comet"]:
        expected = reference.get_scores(analyzer(query))
        (scores,), (ordinals,) = index.search([query], 20)
        found = ordinals >= 0
        assert found.sum() == min(20, np.count_nonzero(expected))
        assert scores[found] == pytest.approx(expected[ordinals[found]], rel=1e-5)
        assert scores[found] == pytest.approx(np.sort(expected)[::-1][: found.sum()], rel=1e-5)


def test_the_size_of_the_blocks_means_nothing(tmp_path):
    for number, block in enumerate((7, 1000)):
        (tmp_path / str(number)).mkdir()
        opened(tmp_path / str(number), TEXTS, block=block)
    for file in (tmp_path / "0" / "bm25").iterdir():
        assert file.read_bytes() == (tmp_path / "1" / "bm25" / file.name).read_bytes()


def test_many_postings_are_sorted_block_by_block(tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = opened(tmp_path / "whole", TEXTS)
    monkeypatch.setattr("pipeline.search.lexical.BLOCK_ENTRIES", 11)
    parts = opened(tmp_path / "parts", TEXTS)
    for mine, other in zip(parts.search(TEXTS, 50), whole.search(TEXTS, 50), strict=True):
        assert (mine == other).all()


def test_words_are_stemmed_stopped_and_lowered():
    assert Analyzer("english")("The HARBOURS are running") == ["harbour", "run"]
    assert Analyzer("none")("The HARBOURS are running") == ["the", "harbours", "are", "running"]
    assert Analyzer("german")("Die Häuser") == ["haus"]
    assert Analyzer("finnish")("talossa") == ["talo"]  # a stemmer without a list of stop words
    assert Analyzer("english")("snake_case x2 5") == ["snake", "case", "x2", "5"]
    assert Analyzer("none")("東京 tokyo") == ["東", "京", "tokyo"]


def test_what_shares_no_word_is_not_found(tmp_path):
    index = opened(tmp_path, TEXTS)
    scores, ordinals = index.search(["zzz", "", "the", "harbour"], 5)
    assert (ordinals[:3] == -1).all()
    assert (scores[:3] == -np.inf).all()
    assert ordinals[3, 0] == TEXTS.index("The harbour, the harbour and again: the HARBOUR!")
    assert index.search(["港"], 3)[1][0].tolist() == [TEXTS.index("東京の港は大きい"), -1, -1]


def test_only_what_is_allowed_is_found(tmp_path):
    index = opened(tmp_path, TEXTS)
    (everything,) = index.search(["harbour"], len(TEXTS))[1]
    everything = everything[everything >= 0]
    allowed = np.arange(len(TEXTS)) % 3 == 0
    (some,) = index.search(["harbour"], len(TEXTS), allowed)[1]
    assert 0 < allowed[everything].sum() < len(everything)
    assert some[some >= 0].tolist() == [ordinal for ordinal in everything if allowed[ordinal]]


@pytest.mark.parametrize("texts", [[], [""], ["the"]])
def test_an_index_without_words_finds_nothing(tmp_path, texts):
    assert (opened(tmp_path, texts).search(["harbour"], 2)[1] == -1).all()


def test_an_unknown_language_is_refused():
    with pytest.raises(ConfigError, match=r"index.language: klingon is not known; take none, or one of .*english"):
        Analyzer("klingon")
    unknown = make_config("/nowhere/root", "/nowhere/corpus", index={"lexical": True, "language": "klingon"})
    with pytest.raises(ConfigError, match=r"index.language: klingon"):  # before anything is read or encoded
        reindex(unknown)
    with pytest.raises(ConfigError, match=r"index.language: klingon"):
        make_plan(plan_job(unknown, on_gpu=False), lambda texts: 1.0)


def test_a_damaged_index_is_refused(tmp_path):
    opened(tmp_path, TEXTS)
    with pytest.raises(VerificationError, match="305 texts, the manifest says 7"):
        Lexical(tmp_path, "english", 7)
    file = tmp_path / "bm25" / "data.csc.index.npy"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(VerificationError, match="not readable by bm25s"):
        Lexical(tmp_path, "english", len(TEXTS))
