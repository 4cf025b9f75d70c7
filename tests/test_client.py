import json

import numpy as np
import pytest

import pipeline
from pipeline.artifacts.publish import require_live
from pipeline.client import open_root
from pipeline.errors import ConfigError
from pipeline.root.storage import Storage
from pipeline.run import reindex
from pipeline.search.reranker import load_reranker
from tests.conftest import make_config, sentences, start_ray, write_jsonl
from tests.test_reranker import save_model


@pytest.fixture(scope="module")
def root(tmp_path_factory, short_tmp):
    """A root with a lexical index and metadata, and one without."""
    folder = tmp_path_factory.mktemp("client")
    start_ray(short_tmp)
    rows = [row | {"year": 2000 + number} for number, row in enumerate(sentences(40))]
    write_jsonl(folder / "corpus" / "a.jsonl", [*rows, {"id": "rates", "text": "Interest rates rose.", "year": 1999}])
    store = {"store": {"embeddings": str(folder / "embeddings")}}
    rich = make_config(folder / "rich", folder / "corpus", corpus={"metadata": ["year"]}, index={"lexical": True}, **store)
    plain = make_config(folder / "plain", folder / "corpus", **store)
    for config in (rich, plain):
        assert reindex(config).committed
    return rich, plain


def test_an_artifact_is_asked_in_python(root):
    rich, _ = root
    live = require_live(Storage(rich.root))
    opened = pipeline.open_artifact(f"{rich.root}/artifacts/{live.version}")
    assert opened.version == live.version
    for mode in ("dense", "lexical", "hybrid"):
        (hit,) = opened.search("interest rates", k=1, mode=mode)
        assert (hit.doc_id, hit.rank, json.loads(hit.metadata)) == ("rates", 1, {"year": 1999})
    late = opened.search("a note", k=5, filter={"type": "gt", "key": "year", "value": 2036})
    assert sorted(json.loads(hit.metadata)["year"] for hit in late) == [2037, 2038, 2039]
    assert opened.search("a note", filter='{"type": "lt", "key": "year", "value": 1999}') == []
    (first,) = opened.texts(["interest rates"], k=3, mode="hybrid")
    assert set(first[0].scores) == {"dense", "lexical", "hybrid"}


def test_what_an_artifact_has_not_is_refused(root):
    opened = open_root(root[1])
    assert len(opened.search("a note", k=3)) == 3
    with pytest.raises(ConfigError, match=r"no lexical index; set index.lexical: true and run vecmill reindex"):
        opened.search("a note", mode="hybrid")
    with pytest.raises(ConfigError, match=r"no metadata; name columns in corpus\.metadata and run vecmill reindex"):
        opened.search("a note", filter={"type": "eq", "key": "year", "value": 1})
    with pytest.raises(ConfigError, match="the query is empty"):
        opened.search(" ")


def test_the_config_says_how_it_is_searched(root):
    rich, _ = root
    config = rich.model_copy(update={"search": rich.search.model_copy(update={"mode": "lexical", "k": 2})})
    hits = open_root(config).search("interest harbour")
    assert 1 <= len(hits) <= 2
    assert hits[0].score > 1  # BM25, no cosine


def test_a_lexical_index_is_added_without_encoding(root):
    """Another artifact is merged; nothing is encoded or trained."""
    _, plain = root
    wanted = plain.model_copy(update={"index": plain.index.model_copy(update={"lexical": True})})
    before = open_root(plain).version
    outcome = reindex(wanted)
    assert (outcome.committed, outcome.encoded, outcome.trained) == (True, 0, False)
    assert outcome.live.version != before
    assert open_root(wanted).search("interest", mode="lexical")[0].doc_id == "rates"
    assert reindex(wanted).built is None


def test_langchain_retrieves(root):
    messages = pytest.importorskip("langchain_core.runnables")
    from pipeline.retrievers.langchain import VecmillRetriever

    retriever = VecmillRetriever(artifact=open_root(root[0]), k=2, filter={"type": "gte", "key": "year", "value": 1999})
    (first, _) = retriever.invoke("interest rates")
    assert (first.id, first.page_content) == ("rates", "Interest rates rose.")
    assert first.metadata["year"] == 1999
    assert first.metadata["source"].endswith("a.jsonl:40")
    chain = retriever | messages.RunnableLambda(lambda documents: [document.id for document in documents])
    many = chain.batch(["interest rates"] * 8 + ["a note"])
    assert all(found[0] == "rates" for found in many[:8])
    assert len(many[8]) == 2


def test_llama_index_retrieves(root):
    pytest.importorskip("llama_index.core")
    from pipeline.retrievers.llama_index import VecmillRetriever

    opened = open_root(root[0])
    (first, second) = VecmillRetriever(opened, k=2, mode="hybrid").retrieve("interest rates")
    assert (first.node.node_id, first.node.get_content()) == ("rates", "Interest rates rose.")
    assert first.score > second.score
    assert first.node.metadata["year"] == 1999
    assert [first.node.start_char_idx, first.node.end_char_idx] == first.node.metadata["span"]


def test_the_best_are_ordered_by_the_cross_encoder(root, tmp_path, minilm):
    rich, _ = root
    folder = str(save_model(tmp_path / "reranker", minilm[1].path))
    search = rich.search.model_copy(update={"reranker": folder, "rerank_depth": 5})
    opened = open_root(rich.model_copy(update={"search": search}))
    query = "Interest in the harbour"
    (before,) = opened.texts([query], 8)
    (after,) = opened.texts([query], 8, rerank=True)
    scores = load_reranker(folder).score(query, [text.text for text in before[:5]])
    assert [text.text for text in after[:5]] == [before[place].text for place in np.argsort(-scores)]
    assert [text.text for text in after[5:]] == [text.text for text in before[5:]]
    assert [text.scores["rerank"] for text in after[:5]] == pytest.approx(sorted(scores.tolist(), reverse=True), abs=1e-4)
    assert all(text.score == text.scores["rerank"] for text in after[:5])
    assert all("rerank" not in text.scores for text in after[5:])
    assert [text.rank for text in after] == list(range(1, 9))
    assert [hit.rank for hit in opened.search(query, 3, rerank=True)] == [1, 2, 3]
    (few,) = opened.texts([query], 2, rerank=True)
    assert [text.text for text in few] == [text.text for text in after[:2]]
    hurried = search.model_copy(update={"rerank_ms": 1e-6})
    (unscored,) = open_root(rich.model_copy(update={"search": hurried})).texts([query], 8, rerank=True)
    assert [text.text for text in unscored] == [text.text for text in before]
    with pytest.raises(ConfigError, match=r"no re-ranker; set search\.reranker"):
        open_root(rich).search(query, rerank=True)
