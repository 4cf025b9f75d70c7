"""How a model is trained, and what came of it. No torch here, so that a command line starts in milliseconds."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.fingerprint import fingerprint
from pipeline.model import resolve_spec
from pipeline.model_files import check_weights, hash_files, locate
from pipeline.training.pairs import Pair

Kind = Literal["encoder", "reranker", "distilled"]
LOG = "training.jsonl"
"""In the folder of a trained model: what it was made from, then its losses. Not JSON by name, so no part of its identity."""


@dataclass(frozen=True)
class Recipe:
    """``batch``: pairs per step, whatever the number of workers; the optimizer takes a step every ``accumulate`` of them.

    ``warmup``: share of the steps. ``negatives``: mined ones that are used of each pair, at most. ``dims``: Matryoshka, the
    leading dimensions that are trained to stand alone (arXiv 2205.13147). ``max_tokens``: of a text in training, or of query
    and text together and for good for a re-ranker; default: the model's.
    """

    epochs: float
    batch: int
    learning_rate: float
    warmup: float = 0.1
    negatives: int = 4
    accumulate: int = 1
    dims: tuple[int, ...] = ()
    max_tokens: int | None = None
    seed: int = 1234


@dataclass(frozen=True)
class Training:
    """A training as asked for: ``model``, which is in ``folder``, becomes ``out``. ``prompts``: of documents and of queries."""

    kind: Kind
    model: str
    folder: Path
    files_hash: str
    pairs: Sequence[Pair]
    recipe: Recipe
    out: Path
    prompts: tuple[str, str] = ("", "")
    trust_remote_code: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result but for the arithmetic of the machine."""
        pairs = fingerprint([[pair.query, pair.positive, list(pair.negatives), list(pair.scores)] for pair in self.pairs])
        recipe = cast(dict[str, Any], json.loads(json.dumps(asdict(self.recipe))))
        prompts = list(self.prompts)
        return {"kind": self.kind, "files": self.files_hash, "pairs": pairs, "prompts": prompts, "recipe": recipe}

    @property
    def scratch(self) -> Path:
        """Where its checkpoints are until it is done: beside ``out``."""
        return self.out.with_name(f"{self.out.name}.training")


def plan_training(
    kind: Kind, config: Config, pairs: Sequence[Pair], recipe: Recipe, out: Path, model: str | None = None
) -> Training:
    """The training of ``encoder.model``, or of another ``model`` (a folder, ``package:<import name>/<folder>``)."""
    spec, folder = resolve_spec(**config.encoder.model_dump(exclude={"precision", "backend"}))
    path = locate(model, None) if model else folder.path
    check_weights(path)
    return Training(
        kind,
        model or spec.model,
        path,
        hash_files(str(path)),
        pairs,
        recipe,
        out.absolute(),
        prompts=spec.prompts,
        trust_remote_code=spec.trust_remote_code,
    )


@dataclass(frozen=True)
class Trained:
    """A model folder; ``losses``: (step, mean since the last one). ``resumed``: the step that this run went on from."""

    out: Path
    steps: int
    losses: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    resumed: int = 0


def share(recipe: Recipe, workers: int) -> int:
    """Pairs of a batch that one worker has on its device at once. Raises ConfigError unless it is a whole number."""
    if recipe.batch % (workers * recipe.accumulate):
        raise ConfigError(f"batch: {recipe.batch} pairs are no multiple of {workers} workers x {recipe.accumulate}; change it")
    return recipe.batch // (workers * recipe.accumulate)


def finished(training: Training) -> Trained | None:
    """The same training, done before; None where nothing is at ``out``. Raises ConfigError where something else is."""
    if not training.out.exists():
        return None
    log = training.out / LOG
    if log.is_file():
        first, *rest = (json.loads(line) for line in log.read_text(encoding="utf-8").splitlines())
        if first["identity"] == training.identity:
            losses = [(line["step"], line["loss"]) for line in rest]
            return Trained(training.out, first["steps"], losses, first["seconds"], first["steps"])
    raise ConfigError(f"{training.out}: exists, and is not of this training; choose another folder or delete it")


def begin(training: Training) -> Path:
    """The folder for checkpoints: a new one, or that of the same training, cut short. ConfigError where it is another's."""
    mark = training.scratch / "identity.json"
    if not mark.is_file():
        training.scratch.mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps(training.identity), encoding="utf-8")
    elif json.loads(mark.read_text(encoding="utf-8")) != training.identity:
        raise ConfigError(f"{training.scratch}: the checkpoints of another training; delete them or choose another folder")
    return training.scratch / "checkpoints"


def write_log(folder: Path, training: Training, trained: Trained, about: dict[str, Any]) -> None:
    """``training.jsonl`` of a model folder."""
    sources = sorted({pair.source or "unknown" for pair in training.pairs})
    first = {"identity": training.identity, "model": training.model, "pairs": len(training.pairs), "sources": sources}
    first |= {"steps": trained.steps, "seconds": round(trained.seconds, 1), **about}
    lines = [first, *({"step": step, "loss": loss} for step, loss in trained.losses)]
    (folder / LOG).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
