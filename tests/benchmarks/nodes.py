"""Measures what a run does on one, two and four Ray nodes of the same machine; writes nodes.json. Five minutes on 2 slow cores.

``python tests/benchmarks/nodes.py``. Nodes that share two cores can show no speed, so what is told is what they can show: that
every unit is encoded once, how evenly units fall on nodes, that vectors stay where they are made (bytes that come into Ray's
object stores, beside those of the vectors, and beside a control whose encoders hand their vectors on), and that the artifact
is the same to the byte. Units are so large that Ray would not send their vectors inside of messages.
The encoder is one layer of MiniLM in FP32 with one thread, so that the same unit gives the same bits anywhere.
"""

import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HOME = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HOME))
os.environ["PYTHONPATH"] = str(HOME)

import ray
from ray._private import internal_api
from ray.cluster_utils import Cluster

from pipeline.config import Config
from pipeline.run import reindex
from pipeline.stages import embed
from tests.benchmarks.machine import machine
from tests.conftest import make_config, save_first_layer, sentences, write_jsonl

NODES = (1, 2, 4)
CPUS = 4
"""Of all nodes together, as they tell Ray."""
DOCUMENTS, FILES, UNIT = 24_000, 4, 500


class ToldActor(embed.EncoderActor):
    """An encoder's actor that notes where it encoded what."""

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        found = super().__call__(row)
        line = [ray.get_runtime_context().get_node_id(), json.loads(found["record"])["unit"]]
        with Path(f"{self._storage.uri}/{os.getpid()}.told").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return found


class SendingActor(ToldActor):
    """What must not be: an encoder's actor that hands as many bytes on as its vectors have."""

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return super().__call__(row) | {"vectors": bytes(2 * self._encoder.dim * UNIT)}


def main() -> None:
    found: dict[str, Any] = {"measured": machine(), "documents": DOCUMENTS, "clusters": []}
    with tempfile.TemporaryDirectory(prefix="vm", dir="/tmp") as home:
        save_first_layer(Path(home) / "model")
        rows = list(sentences(DOCUMENTS))
        for number in range(FILES):
            write_jsonl(Path(home) / "corpus" / f"{number}.jsonl", rows[number::FILES])
        made = []
        for nodes in NODES:
            embed.EncoderActor = ToldActor  # type: ignore[misc]
            told, files = run(Path(home), nodes)
            found["clusters"].append(told)
            made.append(files)
            print(json.dumps(told), flush=True)
        embed.EncoderActor = SendingActor  # type: ignore[misc]
        found["control"] = run(Path(home), 2, "control")[0]
        print(json.dumps(found["control"]), flush=True)
    assert found["control"]["object_store_bytes"] > found["control"]["vector_bytes"]
    assert all(each["object_store_bytes"] < each["vector_bytes"] / 2 for each in found["clusters"])
    names = {name for each in made for name in each}
    found["same_files"] = sorted(name for name in names if len({each.get(name) for each in made}) == 1)
    found["other_files"] = sorted(names - set(found["same_files"]))
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(found["same_files"], found["other_files"])


def run(home: Path, nodes: int, name: str = "") -> tuple[dict[str, Any], dict[str, str]]:
    """A reindex from nothing; what it took, and the hash of each file of its artifact."""
    size: dict[str, Any] = {"num_cpus": CPUS // nodes, "object_store_memory": 200 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            cluster.add_node(**size)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        outcome = reindex(settings(home, nodes, name or str(nodes)))
        stats = internal_api.get_memory_info_reply(internal_api.get_state_from_address(cluster.address)).store_stats
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert outcome.live is not None
    lines = [json.loads(line) for file in home.glob(f"store-{name or nodes}/*.told") for line in file.read_text().splitlines()]
    by_node, by_unit = Counter(node for node, _ in lines), Counter(unit for _, unit in lines)
    told = {
        "nodes": nodes,
        "passages": outcome.live.counts["passages"],
        "encoded": outcome.encoded,
        "units": len(by_unit),
        "units_encoded_twice": sum(count - 1 for count in by_unit.values()),
        "units_per_node": sorted(by_node.values()),
        "vector_bytes": 2 * outcome.live.dim * outcome.encoded,
        "object_store_bytes": stats.cumulative_created_bytes,
        "spilled_bytes": stats.spilled_bytes_total,
    }
    return told, {name: file.sha256 for name, file in outcome.live.files.items()}


def settings(home: Path, nodes: int, name: str) -> Config:
    return make_config(
        home / f"root-{name}", home / "corpus", encoder={"model": str(home / "model"), "precision": "fp32"},
        index={"kind": "ivfpq", "nlist": 16}, compute={"unit_passages": UNIT, "encoders": CPUS // 2 if nodes == 1 else nodes,
        "cpus_per_encoder": 1}, store={"embeddings": str(home / f"store-{name}")},
    )  # fmt: skip


if __name__ == "__main__":
    main()
