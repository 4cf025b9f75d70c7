"""Labelled quality on SciFact: exact search gives MiniLM's known nDCG@10, the index is close to it."""

import json

import pytest

from pipeline.run import reindex
from tests.conftest import SHARED_DATA, make_config
from tests.e2e.test_cli import vecmill

SCIFACT = SHARED_DATA / "scifact"

pytestmark = pytest.mark.skipif(not SCIFACT.is_dir(), reason="the labelled sets in ../shared/data are not here")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("scifact")


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("kind", ["auto", "ivfpq", "ivfpqfs"])
def test_scifact_ndcg(root, kind):
    sections = {
        "passages": {"long": "truncate"},
        "index": {"kind": kind},
        "store": {"embeddings": str(root / "embeddings")},
        "evaluation": {"queries": str(SCIFACT / "queries.jsonl.gz"), "qrels": str(SCIFACT / "qrels" / "test.tsv")},
    }
    config = make_config(root / kind, SCIFACT, **sections)
    outcome = reindex(config)
    assert outcome.snapshot.counts["documents"] == 5183
    assert outcome.snapshot.counts["truncated"] > 3000
    assert outcome.encoded in {0, 5183}
    file = root / f"{kind}.yaml"
    file.write_text(json.dumps({"root": config.root, "corpus": {"uri": str(SCIFACT)}, **sections}))
    metrics = json.loads(vecmill("evaluate", "-c", file, "--json").stdout)
    print(kind, metrics, outcome.live.evaluation.point)
    assert metrics["exact"]["ndcg@10"] == pytest.approx(0.645, abs=0.002)
    assert metrics["index"]["ndcg@10"] == pytest.approx(metrics["exact"]["ndcg@10"], abs=0.01)
    assert metrics["index"].keys() == metrics["exact"].keys() == {"ndcg@10", "mrr@10", "recall@100"}
    assert outcome.live.evaluation.labelled["exact"]["ndcg@10"] == pytest.approx(metrics["exact"]["ndcg@10"], abs=1e-4)
    assert outcome.live.index.kind == ("flat" if kind == "auto" else kind)
