"""A node of a cluster lost while it encodes: the real model on two Ray nodes."""

import threading
import time

import pytest
import ray
from ray.cluster_utils import Cluster

from pipeline.artifacts.audit import audit
from pipeline.run import reindex
from tests.conftest import make_config, sentences, write_jsonl
from tests.e2e.test_reindex import search

CHECK_EVERY_MS = 1000
DOCUMENTS, UNIT = 2400, 100


@pytest.fixture
def cluster(no_ray):
    """A head and a second node, one CPU each; a node that is gone is missed after three seconds."""
    health = {"health_check_initial_delay_ms": 0, "health_check_period_ms": CHECK_EVERY_MS, "health_check_failure_threshold": 3}
    head = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False, "_system_config": health}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.timeout(300)
def test_a_run_outlives_a_node(tmp_path, cluster):
    doomed = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    cluster.wait_for_nodes()
    write_jsonl(tmp_path / "corpus" / "a.jsonl", sentences(DOCUMENTS))
    config = make_config(
        tmp_path / "root", tmp_path / "corpus", index={"kind": "flat"}, encoder={"precision": "fp32"},
        compute={"address": cluster.address, "unit_passages": UNIT},
    )  # fmt: skip
    done_before = []

    def kill() -> None:
        while not (done := list((tmp_path / "root").glob("embeddings/*/*.json"))):
            time.sleep(0.01)
        cluster.remove_node(doomed, allow_graceful=False)
        done_before.extend(done)

    threading.Thread(target=kill, daemon=True).start()
    outcome = reindex(config)
    assert 0 < len(done_before) < DOCUMENTS / UNIT / 2
    assert (outcome.encoded, outcome.committed) == (DOCUMENTS, True)
    assert outcome.live.counts["passages"] == outcome.live.counts["document_rows"] == DOCUMENTS
    assert audit(config, DOCUMENTS).passages == DOCUMENTS
    assert search(config, "Note 42 on the glacier and the furnace.", 1)[0].doc_id == "d42"
