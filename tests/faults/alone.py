"""A whole run in this process: no Ray, a stand-in for the encoder, reports without plots; all else is what users run.

Some tenths of a second.
"""

import contextlib
import gc
import hashlib
from collections.abc import Iterator

import numpy as np
import pytest

from pipeline import run
from pipeline.embed.embeddings import put_embeddings
from pipeline.embed.tokenized import tokenize_unit
from pipeline.encoding.unit_vectors import mean_of_windows
from pipeline.reports import report
from pipeline.root.manifest import Record
from pipeline.stages import embed, index, ingest
from pipeline.stages.cluster import Cluster


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``reindex`` and its parts run in this process."""
    gc.freeze()  # every merge collects garbage: not among all that tests and libraries keep
    monkeypatch.setattr(run, "connected", _connected)
    monkeypatch.setattr(report, "_plots", lambda _account: {"tokens": "", "recall": ""})
    monkeypatch.setattr(ingest, "_run", _ingest)
    monkeypatch.setattr(embed, "_run", _embed)
    monkeypatch.setattr(index, "run_one", lambda task, *arguments, cpus: task(*arguments))
    monkeypatch.setattr(index, "run_all", lambda task, calls, cpus, done: [done(task(*call)) for call in calls])
    yield
    gc.unfreeze()


@contextlib.contextmanager
def _connected(_compute) -> Iterator[Cluster]:
    yield Cluster(nodes=1, cpus=1, gpus=0, node_cpus=1)


def _ingest(job, units):
    rows = ({"unit": unit.model_dump_json()} for unit in units)
    done = (ingest._ingest_row(row, job.config, job.spec, job.storage) for row in rows)
    return [ingest._record_of(row) for row in done]


def _embed(job, _cluster, units, _total):
    return [_embed_unit(job, unit) for unit in units]


def _embed_unit(job, unit):
    tokenized = tokenize_unit(unit, job.storage, embed._tokenizer(job.spec), job.spec)
    vectors = np.stack([_vector(text.tobytes(), job.spec.dim) for text in tokenized.tokens])
    vectors, _ = mean_of_windows(vectors, {}, tokenized.windows)
    counts = {"tokens": len(tokenized.ids), "padded_tokens": len(tokenized.ids), "rescued": 0}
    draft = Record(unit=unit.name, files=(), counts=counts, timings_s={"encode": 1.0, "waiting": 0.0})
    return put_embeddings(job.embeddings, job.embedding_folder, tokenized.keys, vectors, {}, draft)


def _vector(text: bytes, dim: int):
    """A direction that the token ids alone decide."""
    seed = int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
    vector = np.random.default_rng(seed).standard_normal(dim).astype(np.float32)
    return vector / np.linalg.norm(vector)
