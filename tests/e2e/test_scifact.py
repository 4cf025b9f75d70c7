"""Labelled quality on SciFact: exact search gives MiniLM's known nDCG@10, the index is close to it."""

import gzip
import json

import pytest

from pipeline.run import reindex
from tests.conftest import SHARED_DATA, make_config, start_ray, write_jsonl
from tests.e2e.test_cli import vecmill

SCIFACT = SHARED_DATA / "scifact"
QRELS = SCIFACT / "qrels" / "test.tsv"
KINDS = ("auto", "ivfpq", "ivfpqfs")

pytestmark = [
    pytest.mark.skipif(not SCIFACT.is_dir(), reason="the labelled sets in ../shared/data are not here"),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A root beside the queries that have judgements, 300 of 1,109."""
    folder = tmp_path_factory.mktemp("scifact")
    judged = {line.split("\t")[0] for line in QRELS.read_text().splitlines()}
    with gzip.open(SCIFACT / "queries.jsonl.gz", "rt") as queries:
        write_jsonl(folder / "queries.jsonl", (row for row in map(json.loads, queries) if row["_id"] in judged))
    return folder / "root"


@pytest.fixture(scope="module")
def outcomes(root, short_tmp):
    """One root, one kind of index after the other: the corpus is read and encoded once."""
    start_ray(short_tmp)
    return {kind: reindex(make_config(root, SCIFACT, **sections(root, kind))) for kind in KINDS}


def sections(root, kind):
    return {
        "passages": {"long": "truncate"},
        "index": {"kind": kind},
        "evaluation": {"queries": str(root.parent / "queries.jsonl"), "qrels": str(QRELS)},
    }


@pytest.mark.parametrize("kind", KINDS)
def test_scifact_ndcg(outcomes, kind):
    outcome = outcomes[kind]
    assert outcome.snapshot.counts["documents"] == 5183
    assert outcome.snapshot.counts["truncated"] > 3000
    assert (outcome.encoded, outcome.committed) == (5183 if kind == KINDS[0] else 0, True)
    assert outcome.live.evaluation.queries == 300
    assert outcome.live.index.kind == ("flat" if kind == "auto" else kind)
    metrics = outcome.live.evaluation.labelled
    print(kind, metrics, outcome.live.evaluation.point)
    assert metrics["exact"]["ndcg@10"] == pytest.approx(0.645, abs=0.002)
    assert metrics["index"]["ndcg@10"] == pytest.approx(metrics["exact"]["ndcg@10"], abs=0.01)
    assert metrics["index"].keys() == metrics["exact"].keys() == {"ndcg@10", "mrr@10", "recall@100"}


def test_evaluate_finds_what_the_run_found(root, outcomes):
    file = root.parent / "c.yaml"
    file.write_text(json.dumps({"root": str(root), "corpus": {"uri": str(SCIFACT)}, **sections(root, KINDS[-1])}))
    metrics = json.loads(vecmill("evaluate", "-c", file, "--json").stdout)
    for which, found in outcomes[KINDS[-1]].live.evaluation.labelled.items():
        assert metrics[which] == pytest.approx(found, abs=1e-4)
