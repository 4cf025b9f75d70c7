"""``vecmill mine``, ``train-encoder``, ``train-reranker``, ``distill``: models made for a corpus, from its own artifact."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.options import ConfigOption, JsonOption, SetOption, VerboseOption, command, one_of, print_json, progress, results
from pipeline.artifacts.live import OpenedHere, open_live
from pipeline.client import Artifact
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.errors import ConfigError
from pipeline.root.job import Event
from pipeline.training.mining import Mining, judged_pairs
from pipeline.training.mining import mine as mine_negatives
from pipeline.training.pairs import Pair, Unlabelled, corpus_pairs, read_pairs, write_pairs
from pipeline.training.recipe import Recipe, Trained, Training, finished, plan_training

Judgements = Mapping[str, Mapping[str, int]]
QueriesOption = Annotated[str | None, typer.Option("--queries", help="JSONL of training queries (_id, text)")]
QrelsOption = Annotated[str | None, typer.Option("--qrels", help="TSV of their judgements (query-id, corpus-id, score)")]
PairsOption = Annotated[str | None, typer.Option("--pairs", help="Parquet of pairs: query, positive, negatives")]
NeededPairs = Annotated[str, typer.Option("--pairs", help="Parquet of pairs with negatives, as vecmill mine writes it")]
OutOption = Annotated[Path, typer.Option("--out", help="Folder of the trained model; must not exist")]
EpochsOption = Annotated[float, typer.Option("--epochs", min=0.01, help="How often all pairs are read")]
BatchOption = Annotated[int, typer.Option("--batch", min=1, help="Pairs per step of the optimizer")]
RateOption = Annotated[float, typer.Option("--learning-rate", min=1e-8, max=1.0, help="At its highest")]
NegativesOption = Annotated[int, typer.Option("--negatives", min=0, help="Mined negatives used of each pair, at most")]
AccumulateOption = Annotated[int, typer.Option("--accumulate", min=1, help="Cut a batch into so many passes, for its memory")]
TokensOption = Annotated[int | None, typer.Option("--max-tokens", min=8, help="Longer texts are cut; default: the model's")]
WorkersOption = Annotated[
    int, typer.Option("--workers", min=1, help="Ray Train workers; more than one need --out where every node sees it")
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Of the order of the pairs, of what is drawn")]


@command
def mine(
    config: ConfigOption,
    out: Annotated[str, typer.Option("--out", help="URI of the Parquet file to write")],
    queries: QueriesOption = None,
    qrels: QrelsOption = None,
    pairs: PairsOption = None,
    unlabelled: Annotated[
        str | None, typer.Option("--from", help="Pairs of the corpus itself: title (-> text) or sentence (-> the rest)")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="With --from: pairs at most, a uniform sample")] = 100_000,
    negatives: Annotated[int, typer.Option("--negatives", min=0, help="Per pair; 0 finds none")] = 4,
    depth: Annotated[int, typer.Option("--depth", min=1, help="Drawn from so many, the nearest that are left")] = 20,
    max_share: Annotated[
        float, typer.Option("--max-share", min=0, max=1, help="Nearer than this share of the answer's cosine: skipped")
    ] = 0.95,
    seed: SeedOption = 1234,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write training pairs with hard negatives: texts that the live artifact finds near a query and that do not answer it."""
    from pipeline.search.judgements import read_qrels  # with what measures: no other command waits for it

    settings = load_config(config, tuple(overrides or ()))
    if settings.passages.late:
        raise ConfigError("mine: passages.late gives vectors that no text has by itself; mine from an artifact made without it")
    opened = open_live(settings)
    artifact = Artifact(opened, settings)
    judged = read_qrels(qrels, settings.store) if qrels else None
    if sum(each is not None for each in (queries, pairs, unlabelled)) != 1 or (queries is not None and judged is None):
        raise ConfigError("mine: give --queries with --qrels, or --pairs, or --from")
    shown = None
    if pairs is not None:
        found = read_pairs(pairs, settings)
    elif unlabelled is not None:
        found = corpus_pairs(settings, one_of("--from", unlabelled, Unlabelled), limit, opened.partition.documents.ids(), seed)
        shown = {str(pair.doc_id): pair.positive for pair in found}  # without their titles, as the answers are
    else:
        found = _judged_pairs(settings, opened, artifact, str(queries), judged or {})
    told: dict[str, Any] = {"pairs": len(found), "artifact": artifact.version, "out": out}
    if negatives:
        mined = mine_negatives(artifact, found, Mining(negatives, depth, max_share, seed), judged, shown)
        found = mined.pairs
        count = sum(len(pair.negatives) for pair in found)
        told |= {"negatives": count, "too_near": mined.too_near, "fewer": mined.fewer}
    write_pairs(out, found, settings)
    if as_json:
        print_json(told)
    else:
        results.print(", ".join(f"{name} {value}" for name, value in told.items()), markup=False)


def _judged_pairs(settings: Config, opened: OpenedHere, artifact: Artifact, queries: str, judged: Judgements) -> list[Pair]:
    from pipeline.search.judgements import read_queries

    texts = read_queries(queries, settings.store)
    return judged_pairs(artifact, opened.partition.documents, texts, judged, f"judgements of {queries}")


@command
def train_encoder(
    config: ConfigOption,
    out: OutOption,
    pairs: PairsOption = None,
    queries: QueriesOption = None,
    qrels: QrelsOption = None,
    epochs: EpochsOption = 2.0,
    batch: BatchOption = 32,
    learning_rate: RateOption = 5e-5,
    negatives: NegativesOption = 1,
    dims: Annotated[str | None, typer.Option("--dims", help="Leading dimensions to train too (Matryoshka): 256,128")] = None,
    max_tokens: TokensOption = None,
    workers: WorkersOption = 1,
    seed: SeedOption = 1234,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Train encoder.model on pairs: each text is the answer of its own query and of no other one in the batch."""
    settings = load_config(config, tuple(overrides or ()))
    if (pairs is None) == (queries is None) or (queries is None) != (qrels is None):
        raise ConfigError("train-encoder: give --pairs, or --queries with --qrels")
    if pairs is not None:
        found = read_pairs(pairs, settings)
    else:
        from pipeline.search.judgements import read_qrels

        opened = open_live(settings)
        judged = read_qrels(str(qrels), settings.store)
        found = _judged_pairs(settings, opened, Artifact(opened, settings), str(queries), judged)
    recipe = Recipe(epochs, batch, learning_rate, negatives=negatives, dims=_dims(dims), max_tokens=max_tokens, seed=seed)
    _tell(_run(plan_training("encoder", settings, found, recipe, out), settings, workers), as_json)


@command
def train_reranker(
    config: ConfigOption,
    out: OutOption,
    pairs: NeededPairs,
    model: Annotated[
        str | None, typer.Option("--model", help="A re-ranker, or an encoder that becomes one; default encoder.model")
    ] = None,
    late: Annotated[
        bool, typer.Option("--late-interaction", help="A model that compares token vectors (ColBERT), not a cross-encoder")
    ] = False,
    epochs: EpochsOption = 2.0,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Pairs per step; default: 4, late interaction 32")] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", min=1e-8, max=1.0, help="At its highest; default: 1e-4, late interaction 5e-5"),
    ] = None,
    negatives: Annotated[
        int | None, typer.Option("--negatives", min=0, help="Used of each pair, at most; default: 4, late interaction 1")
    ] = None,
    accumulate: AccumulateOption = 1,
    max_tokens: TokensOption = None,
    workers: WorkersOption = 1,
    seed: SeedOption = 1234,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Train a model for search.reranker: a cross-encoder (LCE), or one of late interaction, answers above negatives."""
    settings = load_config(config, tuple(overrides or ()))
    batch = batch or (32 if late else 4)
    negatives = (1 if late else 4) if negatives is None else negatives
    learning_rate = learning_rate or (5e-5 if late else 1e-4)
    recipe = Recipe(epochs, batch, learning_rate, negatives=negatives, accumulate=accumulate, max_tokens=max_tokens, seed=seed)
    training = plan_training("late" if late else "reranker", settings, read_pairs(pairs, settings), recipe, out, model)
    _tell(_run(training, settings, workers), as_json)


@command
def distill(
    config: ConfigOption,
    out: OutOption,
    pairs: NeededPairs,
    epochs: EpochsOption = 2.0,
    batch: BatchOption = 32,
    learning_rate: RateOption = 5e-5,
    accumulate: AccumulateOption = 1,
    max_tokens: TokensOption = None,
    workers: WorkersOption = 1,
    seed: SeedOption = 1234,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Train encoder.model to tell answers and negatives apart by as much as search.reranker does (MarginMSE)."""
    from pipeline.training.distillation import taught, teacher_of

    settings = load_config(config, tuple(overrides or ()))
    found = [pair for pair in read_pairs(pairs, settings) if pair.negatives]
    recipe = Recipe(epochs, batch, learning_rate, accumulate=accumulate, max_tokens=max_tokens, seed=seed)
    training = replace(plan_training("distilled", settings, found, recipe, out), teacher=teacher_of(settings))
    _tell(finished(training) or _run(replace(training, pairs=taught(found, settings)), settings, workers), as_json)


def _run(training: Training, settings: Config, workers: int) -> Trained:
    try:
        from pipeline.training.trainer import train
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed; pip install 'vecmill[train]'") from error
    with progress() as say:
        say(Event(training.kind, message=f"{len(training.pairs)} pairs, {training.model}"))
        if workers > 1:
            from pipeline.stages.train import train_on_workers

            return train_on_workers(training, settings.compute, workers)
        return train(training, say)


def _tell(trained: Trained, as_json: bool) -> None:
    first, last = (trained.losses[place][1] for place in (0, -1)) if trained.losses else (None, None)
    told = {"out": str(trained.out), "steps": trained.steps, "resumed": trained.resumed, "seconds": round(trained.seconds, 1)}
    told |= {"first_loss": first, "last_loss": last}
    if as_json:
        print_json(told | {"losses": trained.losses})
    else:
        results.print(", ".join(f"{name} {value}" for name, value in told.items()), markup=False)


def _dims(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(dim) for dim in text.split(",")) if text else ()
    except ValueError as error:
        raise ConfigError(f"--dims {text}: expected numbers and commas, as in 256,128") from error
