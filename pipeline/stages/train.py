"""Training on several Ray workers whose batches are one batch; where one dies, all go on from the last checkpoint.

``Training.out`` and its checkpoints are on a file system that every node of the cluster sees.
"""

import shutil
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from pipeline.config import ComputeConfig
from pipeline.errors import ConfigError, ProcessError
from pipeline.stages.cluster import connected
from pipeline.training.recipe import Trained, Training, check_batch, finished

RESTARTS = 3
"""Of all workers together, after one has died."""


def train_on_workers(training: Training, compute: ComputeConfig, workers: int) -> Trained:
    """As ``trainer.train``, by ``workers`` processes. Raises ProcessError where they die more often than ``RESTARTS`` times."""
    done = finished(training)
    if done is not None:
        return done
    check_batch(training.recipe, workers)
    notes = training.out.with_name(f"{training.out.name}.ray")
    with connected(compute) as cluster:
        room = int(cluster.gpus) or cluster.cpus
        if workers > room:
            raise ConfigError(
                f"--workers {workers}: the cluster has {room} {'GPUs' if cluster.gpus else 'CPUs'}; ask for fewer"
            )
        share_cpus = max(1, min(cluster.cpus // workers, cluster.node_cpus))
        resources = {"CPU": 1, "GPU": 1} if cluster.gpus else {"CPU": share_cpus}
        trainer = TorchTrainer(
            _work,
            train_loop_config={"training": training},
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=bool(cluster.gpus), resources_per_worker=resources),
            run_config=RunConfig(
                name="training",
                storage_path=str(notes),
                failure_config=FailureConfig(max_failures=RESTARTS, controller_failure_limit=RESTARTS),
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            told = " ".join(str(error).split())
            raise ProcessError(f"{training.out}: {workers} workers could not train it, {told}") from error
        finally:
            shutil.rmtree(notes, ignore_errors=True)
    trained = finished(training)
    if trained is None:
        raise ProcessError(f"{training.out}: the workers ended and left no model; run the same command to go on")
    return trained


def _work(settings: dict[str, Any]) -> None:
    from pipeline.training.trainer import train

    train(settings["training"])
