"""What bytes buy: the live vectors under every compression there is, their quality against bytes per vector.

Every kind of index, over all dimensions and over the leading half and quarter (Matryoshka cuts, which only a model that was
trained for them stands well), re-scored from float16, from int8, and not at all. Search settings are those that reach
``index.target_recall`` on held-out passages, so a row is what its bytes can do, not what one search found by chance.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.ann import index, operating
from pipeline.ann.collection import Collection
from pipeline.ann.index_parts import Parts
from pipeline.ann.index_plan import choose
from pipeline.ann.recall import Matrix, Ordinals, drop_self, exact_search, recall, score
from pipeline.ann.vectors import Int8Vectors, to_float32, write_int8
from pipeline.artifacts.live import OpenedHere, open_live
from pipeline.client import Artifact
from pipeline.config import Config
from pipeline.config_what import IndexConfig
from pipeline.errors import ConfigError
from pipeline.root.job import Event, Say, scratch
from pipeline.root.manifest import OperatingPoint, Values
from pipeline.search.document_files import Documents
from pipeline.search.judgements import chosen_queries, ir_metrics, read_qrels

MAX_PASSAGES = 500_000
"""All vectors are held in float32: 768 MB of 384 dimensions."""
CUTS = (1, 2, 4)
KINDS: tuple[tuple[str, int, int], ...] = (
    ("ivfpqfs", 4, 4), ("ivfpq", 8, 8), ("ivfrabitq", 0, 0), ("ivfpqfs", 2, 4), ("ivfpq", 4, 8), ("ivfpq", 2, 8),
    ("ivfsq8", 0, 0),
)  # fmt: skip
"""Kind, dimensions per sub-vector, bits for them."""
METRIC, METRIC_K = "ndcg@10", 10
FOUND_DEPTH = 100
"""Passages per judged query, of which the best documents are taken."""


class Compressed(Values):
    """One compression. Bytes are per vector: of the index in memory, of what re-scores its candidates on disk.

    ``recall``: of the exact neighbours in all dimensions; ``quality``: nDCG@10 over judged queries, None without any.
    ``is_best``: nothing of as few bytes in memory is better, or as good and smaller.
    """

    kind: str
    dim: int
    bits_per_dimension: float
    rescore: str
    memory_bytes: float
    disk_bytes: float
    nprobe: int
    candidates: int
    recall: float
    latency_ms: float
    quality: float | None
    is_best: bool = False

    @property
    def worth(self) -> float:
        """What compressions are compared by: quality where there is one, else recall."""
        return self.recall if self.quality is None else self.quality


class Compression(Values):
    """All of them. ``exact``: nDCG@10 of exact search over the stored vectors by dimensions; empty without judgements."""

    artifact: str
    passages: int
    dim: int
    queries: int
    exact: dict[int, float]
    rows: tuple[Compressed, ...]


@dataclass(frozen=True)
class Judged:
    """Judged queries as vectors, and the documents of each ordinal."""

    vectors: Matrix
    names: Sequence[str]
    qrels: Mapping[str, Mapping[str, int]]
    documents: Mapping[int, Sequence[str]]

    def quality(self, ordinals: Ordinals) -> float:
        """nDCG@10 of ranked passages, (q, depth), rolled up to documents."""
        ranked = {
            name: list(dict.fromkeys(doc for row in found if row >= 0 for doc in self.documents[int(row)]))[:METRIC_K]
            for name, found in zip(self.names, ordinals, strict=True)
        }
        return round(ir_metrics(self.qrels, ranked)[METRIC], 4)


@dataclass(frozen=True)
class _Cut:
    """The leading dimensions of the vectors, of length 1 again, with held-out queries and their exact answers among them."""

    vectors: Matrix
    halves: Any
    truth: operating.Truth
    judged: Judged | None

    @property
    def dim(self) -> int:
        return int(self.vectors.shape[1])


def compress(config: Config, say: Say = lambda _: None) -> Compression:
    """Measure the live artifact's vectors. ``evaluation.queries`` and ``qrels`` are what quality is judged by, if there.

    Writes nothing. Raises ConfigError for an artifact of too many passages.
    """
    opened = open_live(config)
    manifest = opened.manifest
    count = manifest.counts["passages"]
    if count > MAX_PASSAGES:
        raise ConfigError(f"{config.root}: {count} passages, at most {MAX_PASSAGES} are compared in memory; index a sample")
    full = to_float32(opened.partition.collection.vectors[:])
    rng = np.random.default_rng(config.index.seed)
    own = np.sort(rng.choice(count, min(config.evaluation.sample, max(1, count // 10)), replace=False))
    judged = judge_of(config, opened)
    whole = _cut(full, own, config.evaluation.k, judged, full.shape[1])
    rows: list[Compressed] = []
    cuts = _cuts(full)
    for dim in cuts:
        cut = whole if dim == whole.dim else _cut(full, own, config.evaluation.k, judged, dim)
        for kind, width, bits in KINDS:
            say(Event("compress", done=len(rows), total=3 * len(KINDS) * len(cuts)))
            if width == 0 or dim % width == 0:
                shape = {"kind": kind} | ({"m": dim // width, "nbits": bits} if width else {})
                rows += _measured(config, shape, cut, whole)
    say(Event("compress", ended=True))
    return Compression(
        artifact=manifest.version, passages=count, dim=full.shape[1], queries=len(judged.names) if judged else 0,
        exact=exact_by_dim(full, judged) if judged else {}, rows=tuple(_best(rows)),
    )  # fmt: skip


def exact_by_dim(full: Matrix, judged: Judged) -> dict[int, float]:
    """nDCG@10 of exact search over the leading dimensions of vectors, (n, dim), as they would be stored in float16."""
    return {
        dim: judged.quality(
            exact_search(_shortened(full, dim).astype(np.float16), _shortened(judged.vectors, dim), FOUND_DEPTH)[1]
        )
        for dim in _cuts(full)
    }


def _cuts(full: Matrix) -> list[int]:
    return [full.shape[1] // part for part in CUTS if full.shape[1] % part == 0]


def judge_of(config: Config, opened: OpenedHere) -> Judged | None:
    """The queries of ``evaluation.queries`` with their vectors, to judge answers by; None where the config names none."""
    evaluation = config.evaluation
    if evaluation.queries is None or evaluation.qrels is None:
        return None
    qrels = read_qrels(evaluation.qrels, config.store)
    texts = chosen_queries(evaluation.queries, config.store, qrels.keys())
    vectors = Artifact(opened, config).encode(list(texts.values()))
    return Judged(vectors, list(texts), {name: qrels[name] for name in texts}, _doc_ids(opened.partition.documents))


def _doc_ids(documents: Documents) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for _, _, batch in documents.batches(["ordinal", "doc_id"]):
        for ordinal, doc_id in zip(batch.column("ordinal").to_pylist(), batch.column("doc_id").to_pylist(), strict=True):
            found.setdefault(ordinal, []).append(doc_id)
    return found


def _cut(full: Matrix, own: Ordinals, k: int, judged: Judged | None, dim: int) -> _Cut:
    vectors = _shortened(full, dim)
    halves = vectors.astype(np.float16)
    truth = operating.ground_truth(halves, vectors[own], own, k)
    return _Cut(vectors, halves, truth, replace(judged, vectors=_shortened(judged.vectors, dim)) if judged else None)


def _shortened(vectors: Matrix, dim: int) -> Matrix:
    """Leading dimensions of unit vectors, of length 1 again."""
    if dim == vectors.shape[1]:
        return vectors
    short = vectors[:, :dim]
    return np.ascontiguousarray(short / np.maximum(np.linalg.norm(short, axis=1, keepdims=True), np.float32(1e-12)))


def _measured(config: Config, shape: dict[str, Any], cut: _Cut, whole: _Cut) -> Iterator[Compressed]:
    """One kind of index over a cut, with each way to re-score."""
    count, dim = cut.vectors.shape
    plan = choose(IndexConfig(**shape), count, dim)
    if plan.kind == "flat":
        return  # too few vectors for a codebook
    own = cut.truth.own
    others = np.setdiff1d(np.arange(count), own) if own is not None and count > 2 * len(own) else np.arange(count)
    rng = np.random.default_rng(config.index.seed)
    sample = np.sort(rng.choice(others, min(len(others), plan.train_vectors), replace=False))
    data = index.train(replace(plan, train_vectors=len(sample)), cut.vectors[sample], config.index.seed)
    codes = index.Trained(data).encode(cut.vectors, "vectors")
    made = index.merge(data, plan.kind, [(codes, np.arange(count))])
    with scratch(config.compute.scratch) as folder:
        file = folder / "index"
        index.write(made, file)
        opened = Parts([(file, 0, count)], dim, mapped=index.can_be_mapped(made))
        write_int8(cut.halves, folder / "int8")
        rescorers = {"float16": cut.halves, "int8": Int8Vectors(folder / "int8", dim), "none": None}
        disk = {"float16": 2 * dim, "int8": (folder / "int8").stat().st_size / count, "none": 0}
        for name, rescorer in rescorers.items():
            collection = Collection(opened, cut.halves, rescorer)
            chosen = operating.choose(
                operating.measure(collection, cut.truth, config.index.target_recall), config.index.target_recall, None
            ).point
            quality = None
            if cut.judged is not None:
                found = collection.search(cut.judged.vectors, FOUND_DEPTH, nprobe=chosen.nprobe, rescoring=chosen.rescore)
                quality = cut.judged.quality(found[1])
            yield Compressed(
                kind=plan.kind, dim=dim, bits_per_dimension=_bits(shape, plan.kind, dim), rescore=name,
                memory_bytes=round(file.stat().st_size / count, 1), disk_bytes=round(disk[name], 1), nprobe=chosen.nprobe,
                candidates=chosen.rescore, recall=round(_recall(collection, cut, whole, chosen), 4),
                latency_ms=round(chosen.latency_ms, 3), quality=quality,
            )  # fmt: skip


def _bits(shape: dict[str, Any], kind: str, dim: int) -> float:
    if kind == "ivfrabitq":
        return 1.0
    return 8.0 if kind == "ivfsq8" else shape["m"] * shape["nbits"] / dim


def _recall(collection: Collection, cut: _Cut, whole: _Cut, point: OperatingPoint) -> float:
    """Share of the nearest neighbours in all dimensions that a search in some of them finds."""
    truth = cut.truth
    assert truth.own is not None  # noqa: S101 - held-out passages are their own ordinals
    scores, ordinals = collection.search(truth.queries, truth.k + 1, nprobe=point.nprobe, rescoring=point.rescore)
    ordinals = drop_self(scores, ordinals, truth.own, truth.k)[1]
    return recall(score(whole.halves, whole.truth.queries, ordinals), whole.truth.scores).mean


def _best(rows: Sequence[Compressed]) -> Iterator[Compressed]:
    """The rows with those marked that no other is better than, or as good and smaller."""
    for row in rows:
        mine = (-row.worth, row.memory_bytes, row.disk_bytes)
        rivals = [(-other.worth, other.memory_bytes, other.disk_bytes) for other in rows]
        beaten = any(rival < mine and rival[1] <= mine[1] for rival in rivals)
        yield row.model_copy(update={"is_best": not beaten})
