import pytest

from pipeline.config import ComputeConfig
from pipeline.stages.cluster import TOKENIZER_CPUS, Cluster


@pytest.mark.parametrize("cpus", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("nodes", [1, 2, 5])
@pytest.mark.parametrize("gpus", [0, 4])
@pytest.mark.parametrize("encoders", [None, 1, 2, 7, 16])
def test_encoders_always_leave_room_for_their_tokenizers(cpus, nodes, gpus, encoders):
    cluster = Cluster(nodes=nodes, cpus=cpus * nodes, gpus=gpus * nodes, node_cpus=cpus)
    compute = ComputeConfig(encoders=encoders)
    per_node = -(-cluster.encoders(compute) // nodes)
    assert cluster.reserved_cpus(compute) > 0
    assert per_node * cluster.reserved_cpus(compute) + TOKENIZER_CPUS <= cpus
    assert cluster.threads(compute) >= 1


@pytest.mark.parametrize(
    ("cluster", "encoders", "threads", "reserved"),
    [
        (Cluster(1, 2, 0, 2), 1, 2, 1.0),
        (Cluster(2, 2, 0, 1), 2, 1, 0.5),
        (Cluster(3, 48, 0, 16), 3, 16, 15.0),
        (Cluster(2, 64, 8, 32), 8, 8, 1.0),
    ],
)
def test_defaults_are_one_encoder_per_gpu_or_node(cluster, encoders, threads, reserved):
    compute = ComputeConfig()
    assert (cluster.encoders(compute), cluster.threads(compute), cluster.reserved_cpus(compute)) == (
        encoders,
        threads,
        reserved,
    )
