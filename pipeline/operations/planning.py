"""The dry run: what a reindex would read, make, take and cost. Counts are exact, sizes estimated from a sample.

Nothing is written under the root. Estimates say what they were made from.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa

from pipeline.ann.index_plan import IndexPlan, choose
from pipeline.artifacts.live import known_files
from pipeline.embed.embeddings import MAX_UNIT_PASSAGES, contexts_of
from pipeline.encoding.batching import lengths_of, pack_batches
from pipeline.encoding.model import EncoderSpec
from pipeline.encoding.numerics import cpu_threads, machine_name, on_gpu
from pipeline.encoding.tokenizer import TextTokenizer
from pipeline.errors import DataError
from pipeline.ingest.corpus import RejectedRow, SourceDocument, read_documents, read_ids
from pipeline.ingest.documents import deleted_keys, resolve
from pipeline.ingest.formats import count_rows
from pipeline.ingest.ingestion import ingest_unit
from pipeline.ingest.passages import Splitter
from pipeline.ingest.slices import Slice
from pipeline.ingest.snapshot import Part, live_keys, parts, put_snapshot
from pipeline.ingest.units import IngestUnit, count_done, deletes_config, identify_files, plan_units
from pipeline.operations.forecast import Ahead, Rate, learned_rate, sizes
from pipeline.root import layout
from pipeline.root.job import Job, scratch
from pipeline.root.manifest import InputFile
from pipeline.root.shards import keys_of, parquet_bytes, read_columns
from pipeline.root.storage import Storage
from pipeline.search.lexical import check_language

SAMPLE_DOCUMENTS = 2000
SAMPLE_SLICES = 32
CALIBRATION_PASSAGES = 2048
CALIBRATION_S = 5.0
WARM_UP_BATCHES = 4


@dataclass(frozen=True)
class Plan:
    """What a reindex would do. ``*_bytes`` are bytes, ``encode_s`` seconds on this machine with one encoder.

    ``rate_source``: where ``tokens_per_s`` is from.
    """

    files: int
    input_bytes: int
    formats: tuple[str, ...]
    ignored: tuple[str, ...]
    units: int
    units_done: int
    documents: int
    sampled_documents: int
    sampled_rejected: int
    passages: int
    tokens: int
    truncated_documents: int
    embedding_bytes: int
    artifact_bytes: int
    index: IndexPlan
    index_bytes: int
    merge_memory_bytes: int
    tokens_per_s: float
    rate_source: str
    encode_s: float
    encoder: str
    dim: int


def sample_texts(job: Job) -> list[str]:
    """Passages of a sample of the corpus, without writing anything."""
    units = plan_units(identify_files(job.config, known_files(job.storage)).chosen, job.config, job.spec.space)
    sample, _ = _usable_sample([part for unit in units for part in unit.slices], job)
    split = _splitter(job)([document.text for document in sample])
    return [passage.text for each in split for passage in each]


@dataclass(frozen=True)
class Counted:
    """A corpus, from a sample or from all of it. ``passages``: all, ``distinct``: different ones, as far as is known.

    ``document_bytes``: of texts and ids, compressed. ``texts``: some passages.
    """

    documents: int
    sampled_documents: int
    rejected: int
    passages: int
    distinct: int
    tokens: int
    truncated_documents: int
    document_bytes: float
    texts: list[str]


def make_plan(job: Job, calibrate: Callable[[Sequence[str]], float], *, full: bool = False) -> Plan:
    """Count, sample, choose. ``calibrate`` encodes texts and returns their tokens per second, where no record tells them.

    ``full``: read, check and split the whole corpus into a scratch folder, as a run would, instead of a sample of it.
    """
    check_language(job.config.index)
    listed = identify_files(job.config, known_files(job.storage))
    files = listed.chosen
    units = plan_units(files, job.config, job.spec.space)
    counted = _all(job, units, [file for file, _ in files]) if full else _sampled(job, units)
    rate = learned_rate(job, machine_name(job.config.compute.cpus_per_encoder or cpu_threads()))
    if rate is None:
        places = np.linspace(0, len(counted.texts) - 1, min(len(counted.texts), CALIBRATION_PASSAGES)).astype(int)
        rate = Rate(calibrate([counted.texts[place] for place in places]), "passages encoded just now")
    plan = choose(job.config.index, counted.distinct, job.spec.dim)
    unit = job.config.compute.unit_passages or MAX_UNIT_PASSAGES["gpu" if on_gpu() else "cpu"]
    ahead = Ahead(counted.distinct, counted.tokens, counted.document_bytes, counted.distinct, 1, unit, None)
    made = sizes(job.config, plan, ahead, job.spec.dim)
    return Plan(
        files=len(files),
        input_bytes=sum(file.size_bytes for file, _ in files),
        formats=tuple(sorted({kind for _, kind in files})),
        ignored=listed.ignored,
        units=len(units),
        units_done=count_done(job.storage, units),
        documents=counted.documents,
        sampled_documents=counted.sampled_documents,
        sampled_rejected=counted.rejected,
        passages=counted.passages,
        tokens=counted.tokens,
        truncated_documents=counted.truncated_documents,
        index=plan,
        tokens_per_s=rate.tokens_per_s,
        rate_source=rate.source,
        encode_s=counted.tokens * counted.distinct / max(1, counted.passages) / rate.tokens_per_s,
        encoder=f"{job.spec.model}, {job.spec.precision}",
        dim=job.spec.dim,
        **made,
    )


def _sampled(job: Job, units: Sequence[IngestUnit]) -> Counted:
    """Rows are counted, passages extrapolated from some documents of every part of the corpus."""
    slices = [part for unit in units for part in unit.slices]
    rows = sum(count_rows(part, job.config.store) for part in slices)
    sample, rejected = _usable_sample(slices, job)
    documents = round(rows * len(sample) / (len(sample) + rejected))
    split = _splitter(job)([document.text for document in sample])
    factor = documents / len(sample)
    passages = [passage for each in split for passage in each]
    columns = {"text": [passage.text for passage in passages], "key": [passage.key for passage in passages]}
    return Counted(
        documents=documents,
        sampled_documents=len(sample),
        rejected=rejected,
        passages=round(factor * len(passages)),
        distinct=round(factor * len(passages)),
        tokens=round(factor * sum(passage.tokens for passage in passages)),
        truncated_documents=round(factor * sum(any(passage.truncated for passage in each) for each in split)),
        document_bytes=factor * len(parquet_bytes(pa.table(columns), compress=True)),
        texts=[document.text for document in sample] if job.config.passages.late else [each[0].text for each in split],
    )


def _all(job: Job, units: Sequence[IngestUnit], files: Sequence[InputFile]) -> Counted:
    """What ingest makes of the corpus, in a scratch folder that goes again."""
    corpus = job.config.corpus
    with scratch(job.config.compute.scratch) as folder:
        storage = Storage(str(folder))
        splitter = _splitter(job)
        records = [ingest_unit(unit, job.config, splitter, storage) for unit in units]
        deletes = identify_files(deletes_config(job.config)).chosen if corpus.deletes else ()
        keys = deleted_keys(read_ids(deletes, corpus, job.config.store))
        found = resolve(storage, [records], keys, appended=corpus.mode == "append")
        snapshot = put_snapshot(storage, "plan", files, [records], found, None, "")
        made = parts(storage, snapshot)
        counts, distinct = snapshot.counts, len(live_keys(storage, made))
        chosen = _read_together(storage, made[0]) if made else []
        document_bytes = sum(part.file.size_bytes for part in made)
    if not counts["documents"]:
        raise DataError(f"{corpus.uri}: no document in {counts['rows']} rows; run vecmill validate")
    return Counted(
        documents=counts["documents"],
        sampled_documents=counts["documents"],
        rejected=counts["rejected"],
        passages=counts["passages"],
        distinct=distinct,
        tokens=counts["tokens"],
        truncated_documents=counts["truncated"],
        document_bytes=document_bytes,
        texts=chosen,
    )


def _read_together(storage: Storage, part: Part) -> list[str]:
    """The first texts of a part as the encoder reads them: passages of one context as one."""
    table = read_columns(storage, layout.PASSAGES, part.file, ["key", "text"]).slice(0, 2 * CALIBRATION_PASSAGES)
    texts: dict[bytes, list[str]] = {}
    for context, text in zip(contexts_of(keys_of(table.column("key"))), table.column("text").to_pylist(), strict=True):
        texts.setdefault(context, []).append(text)
    return [" ".join(own) for own in texts.values()]


def measure_rate(spec: EncoderSpec, texts: Sequence[str]) -> float:
    """Tokens per second of this machine on ``texts``, after a warm-up: on some of their batches, about five seconds of them.

    The batches are those of all the texts, of every length: few texts in batches of their own would be padded more.
    """
    from pipeline.encoder import Encoder  # loads a model

    encoder = Encoder(spec)
    tokens, _ = encoder.tokenize_documents(texts)
    lengths = lengths_of(tokens)
    order = np.argsort(-lengths, kind="stable")
    batches = list(pack_batches(lengths[order], encoder.batch_tokens))

    def measured(count: int) -> tuple[float, float]:
        places = np.unique(np.linspace(0, len(batches) - 1, count).astype(int))
        rows = np.concatenate([order[slice(*batches[place])] for place in places])
        started = time.perf_counter()
        found = encoder.encode_tokens([tokens[row] for row in rows], prompt=spec.document_prompt)
        seconds = time.perf_counter() - started
        return found.tokens / seconds, len(places) / seconds

    measured(WARM_UP_BATCHES)
    _, batches_per_s = measured(WARM_UP_BATCHES)
    return measured(max(WARM_UP_BATCHES, round(CALIBRATION_S * batches_per_s)))[0]


def _splitter(job: Job) -> Splitter:
    return Splitter(
        TextTokenizer(job.model, job.spec.max_tokens, job.spec.prompts), job.config.passages, job.spec.document_prompt
    )


def _usable_sample(slices: Sequence[Slice], job: Job) -> tuple[list[SourceDocument], int]:
    """Documents spread over slices, every tenth row from the beginning of each; and the rejected rows among them.

    Raises DataError when all are rejected.
    """
    chosen = [slices[int(number)] for number in np.unique(np.linspace(0, len(slices) - 1, SAMPLE_SLICES).astype(int))]
    each = -(-SAMPLE_DOCUMENTS // len(chosen))
    rows: list[SourceDocument | RejectedRow] = []
    for part in chosen:
        first = list(islice(read_documents(part, job.config.corpus, job.config.store), 10 * each))
        rows += first[:: max(1, len(first) // each)][:each]
    documents = [row for row in rows if isinstance(row, SourceDocument)]
    if not documents:
        raise DataError(f"{job.config.corpus.uri}: none of {len(rows)} sampled rows can be used; run vecmill ingest to see why")
    return documents, len(rows) - len(documents)
