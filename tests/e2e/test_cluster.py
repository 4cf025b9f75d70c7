"""The same program on a cluster: two Ray nodes, started by ``ray job submit``."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from pipeline.artifacts.live import open_live
from pipeline.root.manifest import Record
from tests.conftest import make_config, sentences, write_jsonl

AGENT_ATTEMPTS = 10
HOME = Path(__file__).parent.parent.parent


@pytest.fixture
def two_nodes(short_tmp, no_ray):
    """A head with its dashboard and a second node, one CPU each.

    Ray gives the agent of every head on a machine port 52365; without a port of its own it has none beside another test's Ray
    and no job can be submitted.
    """
    head = {"num_cpus": 1, "include_dashboard": True, "dashboard_port": 18265, "object_store_memory": 100 << 20}
    head["dashboard_agent_listen_port"] = None
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.timeout(400)
def test_job_submitted_to_two_nodes_makes_the_artifact(tmp_path, two_nodes):
    for number in range(3):
        write_jsonl(tmp_path / "corpus" / f"{number}.jsonl", sentences(400, start=400 * number))
    command = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", "http://127.0.0.1:18265"]
    command += ["--working-dir", str(HOME), "--", sys.executable, "-m", "jobs", "reindex", "-c", "configs/cluster.yaml"]
    command += ["--set", f"root={tmp_path}/root", "--set", f"corpus.uri={tmp_path}/corpus", "--set", "index.kind=ivfpq"]
    for _ in range(AGENT_ATTEMPTS):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if "No available agent" not in done.stderr:
            break
        time.sleep(3)  # the head's agent is still starting
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "succeeded" in done.stdout

    config = make_config(tmp_path / "root", tmp_path / "corpus", index={"kind": "ivfpq"})
    opened = open_live(config)
    assert opened.manifest.counts["documents"] == 1200
    records = [Record.model_validate_json(path.read_bytes()) for path in (tmp_path / "root" / "embeddings").rglob("*.json")]
    assert len(records) >= 2
    assert sum(record.counts["passages"] for record in records) == 1200
    assert json.loads((tmp_path / "root" / "log" / "000000000001.json").read_text())["kind"] == "commit"
