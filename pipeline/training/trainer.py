"""The only door to sentence-transformers' trainers: bi-encoders, cross-encoders, one teaching the other.

Contrastive training has every other text of a batch for a negative, and the batch is cut to what memory holds without changing
its gradient (GradCache, arXiv 2101.06983). Checkpoints lie beside the model folder until that is whole: a run that is cut
short goes on from the last, and a folder that has a name is a whole model.
"""

import json
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers import __version__ as trainer_version
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import ListNetLoss
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MarginMSELoss,
    MatryoshkaLoss,
)
from sentence_transformers.util import pairwise_dot_score
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from pipeline import torch_engine
from pipeline.errors import ConfigError
from pipeline.job import Event, Meter, Say
from pipeline.numerics import native_bf16
from pipeline.training.pairs import Pair
from pipeline.training.recipe import Recipe, Trained, Training, begin, finished, share, write_log

MINI_BATCH = 16
"""Texts whose activations are held at once by the contrastive loss: it changes memory and nothing else."""
CHECKPOINTS, CHECKPOINT_STEPS = 10, 20
"""Per training, but no more often than every so many steps; the last two are kept."""
PROMPT_NAMES = ("document", "query")
WORKERS = "WORLD_SIZE"
"""Number of processes that train together, as torch.distributed is told it."""


def train(training: Training, say: Say = lambda _: None) -> Trained:
    """Train and save a model folder, or go on where the same training was cut short; one that is done is told again.

    Among several workers the first one saves. Raises ConfigError where ``out`` is of something else.
    """
    done = finished(training)
    if done is not None:
        return done
    checkpoints = begin(training)
    torch.manual_seed(training.recipe.seed)
    make = _reranker if training.kind == "reranker" else _encoder
    trainer = make(training, checkpoints)
    trainer.remove_callback(PrinterCallback)  # stdout is for results
    trainer.add_callback(_Telling(training, Meter(training.out.name, say)))
    limit = trainer.model.max_seq_length
    if training.recipe.max_tokens:
        trainer.model.max_seq_length = training.recipe.max_tokens
    last = _last_checkpoint(checkpoints)
    resumed = int(last.name.rpartition("-")[2]) if last else 0
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    losses = [(int(line["step"]), float(line["loss"])) for line in trainer.state.log_history if "loss" in line]
    trained = Trained(training.out, trainer.state.global_step, losses, time.perf_counter() - started, resumed)
    if trainer.is_world_process_zero():
        if training.recipe.max_tokens and training.kind != "reranker":
            trainer.model.max_seq_length = limit  # what a text is cut to in training is for time and memory
        _save(trainer.model, training, trained)
    return trained


class _Telling(TrainerCallback):  # type: ignore[misc]
    """Tells how far the training is."""

    def __init__(self, training: Training, say: Say) -> None:
        self._training = training
        self._say = say

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._say(Event(self._training.kind))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        counts = {"pairs": state.global_step * self._training.recipe.batch}
        self._say(Event(self._training.kind, done=state.global_step, total=state.max_steps, counts=counts))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._say(Event(self._training.kind, ended=True))


def _last_checkpoint(checkpoints: Path) -> Path | None:
    """The last one that is whole: its state is written after all else, and may be cut short itself."""
    found = sorted(checkpoints.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]), reverse=True)
    for folder in found:
        with suppress(OSError, ValueError):
            json.loads((folder / "trainer_state.json").read_bytes())
            return folder
    return None


def _save(model: Any, training: Training, trained: Trained) -> None:
    folder = training.scratch / "model"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(str(folder))
    write_log(folder, training, trained, {"sentence_transformers": trainer_version, "torch": torch.__version__})
    folder.replace(training.out)
    shutil.rmtree(training.scratch)


def _encoder(training: Training, checkpoints: Path) -> Any:
    model = _load(training, SentenceTransformer)
    prompts = dict(zip(PROMPT_NAMES, training.prompts, strict=True))
    model.prompts = model.prompts | {name: text for name, text in prompts.items() if text}
    recipe = training.recipe
    width = model.get_embedding_dimension()
    if any(dim > width for dim in recipe.dims):
        raise ConfigError(f"dims: {max(recipe.dims)}, but {training.model} has {width} dimensions; lower it")
    rows = _distilled_rows(training.pairs) if training.kind == "distilled" else _rows(training.pairs, recipe)
    loss: Any
    if training.kind == "distilled":
        loss = MarginMSELoss(model, similarity_fct=_scaled(_scale(model, rows, prompts)))
    else:
        loss = CachedMultipleNegativesRankingLoss(
            model, mini_batch_size=MINI_BATCH, gather_across_devices=int(os.environ.get(WORKERS, "1")) > 1
        )
    if recipe.dims:
        loss = MatryoshkaLoss(model, loss, sorted({*recipe.dims, width}, reverse=True))
    columns = {name: prompts["query" if name == "query" else "document"] for name in rows[0] if name != "label"}
    arguments = SentenceTransformerTrainingArguments(
        **_arguments(training, checkpoints, len(rows)),
        batch_sampler="no_duplicates",  # what answers two queries of a batch is no negative of either
        prompts={name: text for name, text in columns.items() if text} or None,
    )
    return SentenceTransformerTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows), loss=loss)


def _reranker(training: Training, checkpoints: Path) -> Any:
    recipe = training.recipe
    model = _load(training, CrossEncoder)
    rows = [
        {"query": pair.query, "texts": [pair.positive, *negatives], "labels": [1.0] + [0.0] * len(negatives)}
        for pair, negatives in _with_negatives(training.pairs, recipe)
    ]
    arguments = CrossEncoderTrainingArguments(**_arguments(training, checkpoints, len(rows)))
    return CrossEncoderTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows), loss=ListNetLoss(model))


def _load(training: Training, kind: Any) -> Any:
    """The model in FP32; an encoder asked for as a cross-encoder gets a last layer that has learnt nothing yet."""
    device = torch.device("cuda" if torch_engine.has_cuda() else "cpu")
    model = torch_engine.load(str(training.folder), device, trust_remote_code=training.trust_remote_code, kind=kind)
    if kind is CrossEncoder:
        if model.num_labels != 1:
            raise ConfigError(f"{training.model}: found {model.num_labels} outputs, expected one; name another model")
        model.activation_fn = torch.nn.Identity()
    model.model_card_data.generate_widget_examples = False
    return model.train()


def _arguments(training: Training, checkpoints: Path, rows: int) -> dict[str, Any]:
    recipe, on_gpu = training.recipe, torch_engine.has_cuda()
    workers = int(os.environ.get(WORKERS, "1"))
    steps = max(1, round(rows / recipe.batch * recipe.epochs))
    return {
        "output_dir": str(checkpoints),
        "num_train_epochs": recipe.epochs,
        "per_device_train_batch_size": share(recipe, workers),
        "gradient_accumulation_steps": recipe.accumulate,
        "learning_rate": recipe.learning_rate,
        "warmup_steps": recipe.warmup,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "use_cpu": not on_gpu,
        "bf16": torch.cuda.is_bf16_supported() if on_gpu else native_bf16(),
        "ddp_backend": ("nccl" if on_gpu else "gloo") if workers > 1 else None,
        "logging_steps": max(1, steps // 50),
        "save_strategy": "steps",
        "save_steps": max(CHECKPOINT_STEPS, steps // CHECKPOINTS),
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
    }


def _rows(pairs: Sequence[Pair], recipe: Recipe) -> list[dict[str, Any]]:
    """Columns query, positive, negative_0 and on, as the contrastive loss takes them."""
    if not any(pair.negatives for pair in pairs) or not recipe.negatives:
        return [{"query": pair.query, "positive": pair.positive} for pair in pairs]
    return [
        {"query": pair.query, "positive": pair.positive} | {f"negative_{number}": text for number, text in enumerate(negatives)}
        for pair, negatives in _with_negatives(pairs, recipe)
    ]


def _with_negatives(pairs: Sequence[Pair], recipe: Recipe) -> list[tuple[Pair, list[str]]]:
    """Each pair with as many negatives as any has, at most ``recipe.negatives``: what one lacks is drawn from the others'."""
    count = min(recipe.negatives, max(len(pair.negatives) for pair in pairs))
    if not count:
        raise ConfigError("pairs: none has a negative; vecmill mine finds some")
    rng = np.random.default_rng(recipe.seed)
    every = sorted({text for pair in pairs for text in pair.negatives})
    answers: dict[str, set[str]] = {}
    for pair in pairs:
        answers.setdefault(pair.query, set()).add(pair.positive)
    filled = []
    for pair in pairs:
        own = list(pair.negatives[:count])
        while len(own) < count:
            text = every[int(rng.integers(len(every)))]
            own += [text] if text not in answers[pair.query] else []
        filled.append((pair, own))
    return filled


def _distilled_rows(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """One row for each negative of each pair, labelled with how much better the teacher finds the answer."""
    rows = [
        {"query": pair.query, "positive": pair.positive, "negative": negative, "label": pair.scores[0] - score}
        for pair in pairs
        for negative, score in zip(pair.negatives, pair.scores[1:], strict=bool(pair.scores))
    ]
    if not rows:
        raise ConfigError("pairs: none has negatives with a teacher's scores; vecmill mine finds negatives")
    return rows


def _scale(model: Any, rows: Sequence[dict[str, Any]], prompts: dict[str, str]) -> float:
    """What makes the student's margins as wide as the teacher's, whose scores do not end at 1 as cosines do."""
    some = rows[: 16 * MINI_BATCH]
    with torch.inference_mode():
        query = model.encode([row["query"] for row in some], prompt=prompts["query"] or None)
        texts = [[row[name] for row in some] for name in ("positive", "negative")]
        near, far = (model.encode(each, prompt=prompts["document"] or None) for each in texts)
    model.train()
    spread = float(np.std((query * (near - far)).sum(axis=1)))
    return float(np.std([row["label"] for row in some])) / max(spread, 1e-6)


def _scaled(scale: float) -> Any:
    def similarity(first: Any, second: Any) -> Any:
        return scale * pairwise_dot_score(first, second)

    return similarity
