"""How a model is trained, and what came of it. No torch here, so that a command line starts in milliseconds."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from pipeline.config import Config
from pipeline.encoding.model import max_positions, resolve_spec
from pipeline.encoding.model_files import ENCODER, check_weights, hash_files, kind_of, locate
from pipeline.errors import ConfigError
from pipeline.fingerprint import fingerprint
from pipeline.root.storage import Storage
from pipeline.training.pairs import Pair

Kind = Literal["encoder", "reranker", "late", "distilled"]
"""``late``: of late interaction."""
LOSSES: dict[Kind, str] = {"encoder": "cmnrl", "reranker": "lce", "late": "cmnrl", "distilled": "margin-mse"}
"""What each is trained by: a checkpoint of another one is no beginning."""
MODEL_KEYS = ("--model", "to be a folder here")
IDENTITY = "identity.json"
LOG = "training.jsonl"
"""In the folder of a trained model: what it was made from, then its losses. Not JSON by name, so no part of its identity."""


@dataclass(frozen=True)
class Recipe:
    """``batch``: pairs per step of the optimizer, whatever the number of workers; read in ``accumulate`` passes.

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
    teacher: str = ""

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the result but for the arithmetic of the machine: of scores, who gave them."""
        return {
            "kind": self.kind,
            "loss": LOSSES[self.kind],
            "files": self.files_hash,
            "pairs": fingerprint([[pair.query, pair.positive, list(pair.negatives)] for pair in self.pairs]),
            "prompts": list(self.prompts),
            "recipe": cast(dict[str, Any], json.loads(json.dumps(asdict(self.recipe)))),
            "teacher": self.teacher,
        }

    @property
    def scratch(self) -> Path:
        """Where its checkpoints are until it is done: beside ``out``."""
        return self.out.with_name(f"{self.out.name}.training")

    @property
    def checkpoints(self) -> Path:
        """Their folder."""
        return self.scratch / "checkpoints"


def plan_training(
    kind: Kind, config: Config, pairs: Sequence[Pair], recipe: Recipe, out: Path, model: str | None = None
) -> Training:
    """The training of ``encoder.model``, or of another ``model`` (a folder, ``package:<import name>/<folder>``).

    Raises ConfigError for what cannot be trained so.
    """
    spec, folder = resolve_spec(**config.encoder_request())
    path = locate(model, None, MODEL_KEYS) if model else folder.path
    check_weights(path)
    if kind in ("encoder", "distilled") and spec.query_model:
        raise ConfigError("encoder.query_model: pairs train one model for both sides; train without it")
    if not all(1 <= dim <= spec.dim for dim in recipe.dims):
        raise ConfigError(f"dims: {recipe.dims}, but {spec.model} has {spec.dim} dimensions; give fewer, from 1 on")
    prompts, is_static = _prompts_and_static(model, path) if model else (spec.prompts, folder.is_static)
    if is_static and (kind in ("reranker", "late") or recipe.max_tokens):
        raise ConfigError(f"{path}: a bag of token vectors has no limit of tokens and makes no re-ranker")
    if recipe.max_tokens and recipe.max_tokens > (positions := max_positions(path)):
        raise ConfigError(f"max_tokens: {recipe.max_tokens}, but {path} has {positions} positions; lower it")
    if kind == "reranker" and not recipe.negatives:
        raise ConfigError("negatives: a cross-encoder learns an answer only beside others; give 1 or more")
    if kind in ("reranker", "distilled") and not any(pair.negatives for pair in pairs):
        raise ConfigError("pairs: none has a negative; vecmill mine finds some")
    return Training(
        kind,
        model or spec.model,
        path,
        hash_files(str(path)),
        pairs,
        recipe,
        out.absolute(),
        prompts=prompts,
        trust_remote_code=spec.trust_remote_code and model is None,
    )


def _prompts_and_static(model: str, path: Path) -> tuple[tuple[str, str], bool]:
    """Of an encoder that a re-ranker is made of; a re-ranker has its prompts itself."""
    if kind_of(path) != ENCODER:
        return ("", ""), False
    spec, folder = resolve_spec(model=model)
    return spec.prompts, folder.is_static


@dataclass(frozen=True)
class Trained:
    """A model folder; ``losses``: (step, mean since the last one). ``resumed``: the step that this run went on from."""

    out: Path
    steps: int
    losses: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    resumed: int = 0


def check_batch(recipe: Recipe, workers: int) -> None:
    """Raise ConfigError unless each of the workers has equally many pairs of a batch in each pass."""
    if recipe.batch % (workers * recipe.accumulate):
        raise ConfigError(f"batch: {recipe.batch} pairs are no multiple of {workers} workers x {recipe.accumulate}; change it")


def finished(training: Training) -> Trained | None:
    """The same training, done before; None where nothing is at ``out``. Raises ConfigError where something else is."""
    if not training.out.exists():
        return None
    log = training.out / LOG
    if log.is_file():
        first, *rest = (json.loads(line) for line in log.read_text(encoding="utf-8").splitlines())
        if first["identity"] == training.identity:
            losses = [(line["step"], line["loss"]) for line in rest]
            return Trained(training.out, first["steps"], losses, first["seconds"], first["resumed"])
    raise ConfigError(f"{training.out}: exists, and is not of this training; choose another folder or delete it")


def begin(training: Training) -> None:
    """Say in the scratch folder whose checkpoints are there. Raises ConfigError where those of another training are."""
    mark = training.scratch / IDENTITY
    if mark.is_file() and json.loads(mark.read_text(encoding="utf-8")) == training.identity:
        return
    if last_checkpoint(training) is not None:
        raise ConfigError(f"{training.scratch}: the checkpoints of another training; delete them or choose another folder")
    Storage(str(training.scratch)).put(IDENTITY, json.dumps(training.identity).encode())


def last_checkpoint(training: Training) -> Path | None:
    """The last one that is whole: its state is written after all else, and may be cut short itself."""
    folders = training.checkpoints.glob("checkpoint-*")
    for folder in sorted(folders, key=lambda folder: int(folder.name.rpartition("-")[2]), reverse=True):
        with suppress(OSError, ValueError):
            json.loads((folder / "trainer_state.json").read_bytes())
            return folder
    return None


def write_log(folder: Path, training: Training, trained: Trained, about: dict[str, Any]) -> None:
    """``training.jsonl`` of a model folder."""
    sources = sorted({pair.source or "unknown" for pair in training.pairs})
    first = {"identity": training.identity, "model": training.model, "pairs": len(training.pairs), "sources": sources}
    first |= {"steps": trained.steps, "resumed": trained.resumed, "seconds": round(trained.seconds, 1), **about}
    lines = [first, *({"step": step, "loss": loss} for step, loss in trained.losses)]
    (folder / LOG).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
