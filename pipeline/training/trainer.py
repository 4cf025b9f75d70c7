"""The only door to sentence-transformers' trainers: bi-encoders, cross-encoders, late interaction, one teaching another.

Contrastive training has every other text of a batch for a negative, and the batch is cut to what memory holds without changing
its gradient (GradCache, arXiv 2101.06983). Checkpoints lie beside the model folder until that is whole: a run that is cut
short goes on from the last, and a folder that has a name is a whole model.
"""

import os
import shutil
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import (
    CrossEncoder,
    MultiVectorEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers import __version__ as trainer_version
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import ListNetLoss
from sentence_transformers.multi_vector_encoder.losses import CachedMultiVectorMultipleNegativesRankingLoss
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.multi_vector_encoder.trainer import MultiVectorEncoderTrainer
from sentence_transformers.multi_vector_encoder.training_args import MultiVectorEncoderTrainingArguments
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MarginMSELoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
from sentence_transformers.util import pairwise_cos_sim
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from pipeline.encoding import torch_engine
from pipeline.encoding.model_files import LATE_INTERACTION, kind_of
from pipeline.encoding.numerics import native_bf16
from pipeline.errors import ConfigError
from pipeline.root.job import Event, Meter, Say
from pipeline.training.recipe import Trained, Training, begin, check_batch, finished, last_checkpoint, write_log
from pipeline.training.rows import contrastive_rows, distilled_rows, with_negatives

MINI_BATCH = 16
"""Texts whose activations are held at once by the contrastive loss: it changes memory and nothing else."""
CHECKPOINTS, CHECKPOINT_STEPS = 10, 20
"""Per training, but no more often than every so many steps; the last two are kept."""
PROMPT_NAMES = ("document", "query")
ALL_OF_IT = 100.0
"""Label of an answer among negatives of 0: the softmax over labels, which ListNet's loss learns, is then 1 and 0, and that loss
the localized contrastive one (arXiv 2101.08751). Labels of 1 and 0 would have it keep an answer within 1 of its negatives."""
WORKERS = "WORLD_SIZE"
"""Number of processes that train together, as torch.distributed is told it."""


def train(training: Training, say: Say = lambda _: None) -> Trained:
    """Train and save a model folder, or go on where the same training was cut short; one that is done is told again.

    Among several workers the first one saves. Raises ConfigError where ``out`` is of something else.
    """
    done = finished(training)
    if done is not None:
        return done
    torch.manual_seed(training.recipe.seed)
    trainer = {"reranker": _reranker, "late": _late_interaction}.get(training.kind, _encoder)(training)
    begin(training)
    trainer.remove_callback(PrinterCallback)  # stdout is for results
    trainer.add_callback(_Telling(training, Meter(training.out.name, say)))
    cut = training.recipe.max_tokens
    limit = trainer.model.max_seq_length if cut else None
    if cut:
        trainer.model.max_seq_length = cut
    last = last_checkpoint(training)
    resumed = int(last.name.rpartition("-")[2]) if last else 0
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    losses = [(int(line["step"]), float(line["loss"])) for line in trainer.state.log_history if "loss" in line]
    if not trainer.state.global_step:
        raise ConfigError(f"batch: no {training.recipe.batch} pairs without a text in common; lower it")
    trained = Trained(training.out, trainer.state.global_step, losses, time.perf_counter() - started, resumed)
    if trainer.is_world_process_zero():
        if cut and training.kind != "reranker":
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


def _save(model: Any, training: Training, trained: Trained) -> None:
    folder = training.scratch / "model"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(str(folder))
    write_log(folder, training, trained, {"sentence_transformers": trainer_version, "torch": torch.__version__})
    folder.replace(training.out)
    shutil.rmtree(training.scratch)


def _encoder(training: Training) -> Any:
    model = _load(training, SentenceTransformer)
    prompts = dict(zip(PROMPT_NAMES, training.prompts, strict=True))
    model.prompts = model.prompts | prompts  # an empty one too: it is what search must use
    recipe = training.recipe
    is_taught = training.kind == "distilled"
    rows = distilled_rows(training.pairs) if is_taught else contrastive_rows(training.pairs, recipe)
    loss: Any
    if is_taught:
        loss = MarginMSELoss(model, similarity_fct=_scaled(_scale(model, rows, prompts)))
    elif isinstance(model[0], StaticEmbedding):  # whose gradients are small
        loss = MultipleNegativesRankingLoss(model, gather_across_devices=_workers() > 1)
    else:
        loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=MINI_BATCH, gather_across_devices=_workers() > 1)
    if recipe.dims:
        loss = MatryoshkaLoss(model, loss, sorted({*recipe.dims, model.get_embedding_dimension()}, reverse=True))
    arguments = SentenceTransformerTrainingArguments(
        **_arguments(training, len(rows)),
        # a text that answers two queries of a batch would be a negative of one; margins have no negatives but their own
        batch_sampler="batch_sampler" if is_taught else "no_duplicates",
        prompts=_by_column(rows, prompts),
    )
    _on_one_device(arguments)
    return SentenceTransformerTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows), loss=loss)


def _by_column(rows: Sequence[dict[str, Any]], prompts: dict[str, str]) -> dict[str, str] | None:
    """The prompt of each column of texts; None where there is none."""
    columns = {name: prompts["query" if name == "query" else "document"] for name in rows[0] if name != "label"}
    return {name: text for name, text in columns.items() if text} or None


def _late_interaction(training: Training) -> Any:
    """An encoder's own token vectors are kept whole: they are stored nowhere, so nothing is won by fewer dimensions."""
    if kind_of(training.folder) == LATE_INTERACTION:
        model = _load(training, MultiVectorEncoder)
    else:
        transformer = _load(training, SentenceTransformer)[0]
        normalize = Normalize(module_input_name="token_embeddings")
        model = MultiVectorEncoder(modules=[transformer, MultiVectorMask(), normalize], device=str(torch_engine.device()))
        model.prompts = dict(zip(PROMPT_NAMES, training.prompts, strict=True))
        model.model_card_data.generate_widget_examples = False
    rows = contrastive_rows(training.pairs, training.recipe)
    loss = CachedMultiVectorMultipleNegativesRankingLoss(
        model, mini_batch_size=MINI_BATCH, gather_across_devices=_workers() > 1
    )
    prompts = {name: model.prompts.get(name) or "" for name in PROMPT_NAMES}
    arguments = MultiVectorEncoderTrainingArguments(
        **_arguments(training, len(rows)),
        batch_sampler="no_duplicates",
        prompts=_by_column(rows, prompts),
        max_length=training.recipe.max_tokens,
    )
    _on_one_device(arguments)
    return MultiVectorEncoderTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows), loss=loss)


def _reranker(training: Training) -> Any:
    recipe = training.recipe
    model = _load(training, CrossEncoder)
    rows = [
        {"query": pair.query, "texts": [pair.positive, *negatives], "labels": [ALL_OF_IT] + [0.0] * len(negatives)}
        for pair, negatives in with_negatives(training.pairs, recipe)
    ]
    arguments = CrossEncoderTrainingArguments(**_arguments(training, len(rows)))
    _on_one_device(arguments)
    return CrossEncoderTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows), loss=ListNetLoss(model))


def _load(training: Training, kind: Any) -> Any:
    """The model in FP32; an encoder asked for as a cross-encoder gets a last layer that has learnt nothing yet."""
    model = torch_engine.load(
        str(training.folder), torch_engine.device(), trust_remote_code=training.trust_remote_code, kind=kind
    )
    if kind is CrossEncoder:
        if model.num_labels != 1:
            raise ConfigError(f"{training.model}: found {model.num_labels} outputs, expected one; name another model")
        model.activation_fn = torch.nn.Identity()
    model.model_card_data.generate_widget_examples = False
    return model.train()


def _arguments(training: Training, rows: int) -> dict[str, Any]:
    recipe, on_gpu = training.recipe, torch_engine.has_cuda()
    workers = _workers()
    check_batch(recipe, workers)
    if workers > 1 and rows < recipe.batch:
        raise ConfigError(f"batch: {recipe.batch}, but there are {rows} rows to train on; lower it")
    steps = max(1, round(rows / recipe.batch * recipe.epochs))
    return {
        "output_dir": str(training.checkpoints),
        "num_train_epochs": recipe.epochs,
        "per_device_train_batch_size": recipe.batch // recipe.accumulate,
        # each batch is cut among the workers, so that theirs together are those of one; a short last one could not be
        "accelerator_config": {"split_batches": workers > 1},
        "dataloader_drop_last": workers > 1,
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


def _workers() -> int:
    return int(os.environ.get(WORKERS, "1"))


def _on_one_device(arguments: Any) -> None:
    """Keep a process that sees several GPUs to its own: data parallelism would multiply the batch by them."""
    if arguments.device.type == "cuda":
        arguments._n_gpu = 1


def _scale(model: Any, rows: Sequence[dict[str, Any]], prompts: dict[str, str]) -> float:
    """What makes the student's margins as wide as the teacher's, whose scores do not end at 1 as cosines do."""
    some = rows[: 16 * MINI_BATCH]
    with torch.inference_mode():
        queries, *texts = ([row[name] for row in some] for name in ("query", "positive", "negative"))
        query = model.encode(queries, prompt=prompts["query"] or None, normalize_embeddings=True)
        near, far = (model.encode(each, prompt=prompts["document"] or None, normalize_embeddings=True) for each in texts)
    model.train()
    spread = float(np.std((query * (near - far)).sum(axis=1)))
    return float(np.std([row["label"] for row in some])) / max(spread, 1e-6)


def _scaled(scale: float) -> Any:
    def similarity(first: Any, second: Any) -> Any:
        return scale * pairwise_cos_sim(first, second)

    return similarity
