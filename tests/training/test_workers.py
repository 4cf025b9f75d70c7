"""Several Ray Train workers are one trainer: the same losses, and one that is killed costs a few steps."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.stages.train import train_on_workers
from pipeline.training.pairs import Pair
from pipeline.training.recipe import Recipe, plan_training
from pipeline.training.trainer import train
from tests.conftest import TOPICS, make_config, save_first_layer

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(600)]

PAIRS = [
    Pair(f"Which note is about {first}s and {second}s?", f"Note on the {first} and the {second}.")
    for first in TOPICS
    for second in TOPICS
    if first != second
][:70]


@pytest.fixture
def config(tmp_path):
    save_first_layer(tmp_path / "small", dropout=0.0)  # dropout is drawn by each worker for itself
    return make_config(tmp_path / "root", tmp_path / "corpus", encoder={"model": str(tmp_path / "small")})


def test_two_workers_have_the_losses_of_one(config, tmp_path):
    recipe = Recipe(epochs=2, batch=16, learning_rate=2e-4, max_tokens=24)
    one = train(plan_training("encoder", config, PAIRS[:64], recipe, tmp_path / "one"))
    two = train_on_workers(plan_training("encoder", config, PAIRS[:64], recipe, tmp_path / "two"), config.compute, 2)
    assert (one.steps, two.steps) == (8, 8)
    assert len(two.losses) == 8
    assert dict(two.losses) == pytest.approx(dict(one.losses), rel=0.02)
    assert two.losses[-1][1] < 0.7 * two.losses[0][1]
    assert not (tmp_path / "two.training").exists() and not (tmp_path / "two.ray").exists()


def test_a_killed_worker_is_replaced_and_training_goes_on_from_a_checkpoint(config, tmp_path):
    recipe = Recipe(epochs=15, batch=16, learning_rate=1e-4, max_tokens=24)
    training = plan_training("encoder", config, PAIRS, recipe, tmp_path / "model")
    killed = []

    def kill() -> None:
        while not list(training.scratch.glob("checkpoints/checkpoint-20/trainer_state.json")):
            time.sleep(0.05)
        for folder in Path("/proc").glob("[0-9]*"):
            command = (folder / "cmdline").read_bytes() if (folder / "cmdline").exists() else b""
            if command.startswith(b"ray::RayTrainWorker") and not killed:
                killed.append(int(folder.name))
                os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    trained = train_on_workers(training, config.compute, 2)
    killer.join(1)
    assert killed
    assert trained.steps == 60
    assert [step for step, _ in trained.losses] == list(range(1, 61))


def test_a_batch_that_cannot_be_shared_is_refused_at_once(config, tmp_path):
    recipe = Recipe(epochs=1, batch=15, learning_rate=1e-4)
    with pytest.raises(ConfigError, match="batch: 15 pairs are no multiple of 2 workers x 1"):
        train_on_workers(plan_training("encoder", config, PAIRS, recipe, tmp_path / "model"), config.compute, 2)
