"""Labelled quality on a fifth of SciFact: exact search has the nDCG@10 of sentence-transformers, the index is close to it.

Its relevant documents and every sixth of the others; all of it is in tests/benchmarks, and takes minutes.
"""

import gzip
import json

import pytest

from pipeline.run import reindex
from tests.conftest import SHARED_DATA, make_config, start_ray, write_jsonl
from tests.e2e.test_cli import vecmill

SCIFACT = SHARED_DATA / "scifact"
QRELS = SCIFACT / "qrels" / "test.tsv"
KINDS = ("auto", "ivfpq", "ivfpqfs")
DOCUMENTS = 1097
REFERENCE = {"ndcg@10": 0.7873, "mrr@10": 0.7596, "recall@100": 0.9867}
"""By SentenceTransformer.encode, all-MiniLM-L6-v2 in FP32, over the same documents and queries."""

pytestmark = [
    pytest.mark.skipif(not SCIFACT.is_dir(), reason="the labelled sets in ../shared/data are not here"),
    pytest.mark.timeout(600),
]


def lines(name):
    with gzip.open(SCIFACT / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus beside the queries that have judgements, 300 of 1,109."""
    folder = tmp_path_factory.mktemp("scifact")
    judgements = [line.split("\t") for line in QRELS.read_text().splitlines()[1:]]
    queries, relevant = ({row[place] for row in judgements} for place in (0, 1))
    write_jsonl(folder / "queries.jsonl", (row for row in lines("queries") if row["_id"] in queries))
    chosen = (row for place, row in enumerate(lines("corpus")) if row["_id"] in relevant or place % 6 == 0)
    write_jsonl(folder / "corpus" / "corpus.jsonl", chosen)
    return folder


@pytest.fixture(scope="module")
def outcomes(folder, short_tmp):
    """One root, one kind of index after the other: the corpus is read and encoded once."""
    start_ray(short_tmp)
    return {kind: reindex(make_config(folder / "root", folder / "corpus", **sections(folder, kind))) for kind in KINDS}


def sections(folder, kind):
    return {
        "corpus": {"id": "_id", "title": "title"},
        "passages": {"long": "truncate"},
        "index": {"kind": kind},
        "evaluation": {"queries": str(folder / "queries.jsonl"), "qrels": str(QRELS)},
    }


@pytest.mark.parametrize("kind", KINDS)
def test_scifact_ndcg(outcomes, kind):
    outcome = outcomes[kind]
    assert outcome.snapshot.counts["documents"] == DOCUMENTS
    assert outcome.snapshot.counts["truncated"] > 600
    assert (outcome.encoded, outcome.committed) == (DOCUMENTS if kind == KINDS[0] else 0, True)
    assert outcome.live.evaluation.queries == 300
    assert outcome.live.index.kind == ("flat" if kind == "auto" else kind)
    metrics = outcome.live.evaluation.labelled
    assert metrics["exact"] == pytest.approx(REFERENCE, abs=0.002)
    assert metrics["index"]["ndcg@10"] == pytest.approx(metrics["exact"]["ndcg@10"], abs=0.01)
    assert metrics["index"].keys() == metrics["exact"].keys()


def test_evaluate_finds_what_the_run_found(folder, outcomes):
    file, told = folder / "c.yaml", sections(folder, KINDS[-1])
    told["corpus"]["uri"] = str(folder / "corpus")
    file.write_text(json.dumps({"root": str(folder / "root"), **told}))
    metrics = json.loads(vecmill("evaluate", "-c", file, "--json").stdout)
    for which, found in outcomes[KINDS[-1]].live.evaluation.labelled.items():
        assert metrics[which] == pytest.approx(found, abs=1e-4)
