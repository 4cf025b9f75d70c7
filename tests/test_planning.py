"""The dry run against what a run then makes."""

import pytest

from pipeline.operations.planning import make_plan
from pipeline.root.job import plan_job
from pipeline.run import reindex
from tests.conftest import make_config, sentences, write_jsonl
from tests.faults.alone import alone as alone  # a fixture

pytestmark = pytest.mark.usefixtures("alone")


def planned(config, *, full):
    return make_plan(plan_job(config, on_gpu=False), lambda texts: 1000.0, full=full)


def test_a_full_plan_knows_documents_and_passages_exactly(tmp_path):
    long = {"id": "long", "text": " ".join(f"Word {number} after another." for number in range(300))}
    twins = [{"id": "twin1", "text": "The same text."}, {"id": "twin2", "text": "The same text."}]
    rows = [*sentences(300), long, *twins, twins[0], {"id": "bad", "text": ""}, {"id": "gone", "text": "Deleted."}]
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows)
    write_jsonl(tmp_path / "gone.jsonl", [{"id": "gone"}])
    corpus = {"deletes": str(tmp_path / "gone.jsonl")}
    config = make_config(tmp_path / "root", tmp_path / "corpus", corpus=corpus, index={"kind": "flat"})
    plan, sampled = planned(config, full=True), planned(config, full=False)
    assert not (tmp_path / "root").exists()
    outcome = reindex(config)
    counts = outcome.snapshot.counts
    assert (plan.documents, plan.passages, plan.tokens) == (counts["documents"], counts["passages"], counts["tokens"])
    assert plan.sampled_rejected == counts["rejected"] == 1
    assert plan.embedding_bytes == outcome.live.counts["passages"] * (768 + 16)
    assert abs(sampled.passages / counts["passages"] - 1) < 0.03
    index = sum(outcome.live.files[part.name].size_bytes for part in outcome.live.parts)
    assert abs(plan.index_bytes / index - 1) < 0.1
