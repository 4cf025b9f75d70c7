"""Merge: embedding shards, documents and index shards become the data files of an artifact, in bounded memory. No Ray here."""

import contextlib
import gc
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.ann import index
from pipeline.ann.index_plan import ID_BYTES, MERGE_COPIES, code_bytes
from pipeline.ann.recall import Ordinals
from pipeline.ann.vectors import INT8, VECTORS, Vectors, open_vectors, write_int8
from pipeline.artifacts import artifact
from pipeline.artifacts.key_merge import LIBRARY_BYTES, Counts, Sources, merge_rows
from pipeline.config import Config
from pipeline.errors import ConfigError, VerificationError
from pipeline.fingerprint import sha256
from pipeline.memory import frugal_malloc, give_back, peak_memory
from pipeline.root import layout
from pipeline.root.job import Job, scratch
from pipeline.root.manifest import IndexPart, Merged, MergeRecord, TrainedManifest, to_bytes
from pipeline.root.storage import Storage
from pipeline.search.document_files import Documents
from pipeline.search.filters import METADATA, write_metadata
from pipeline.search.lexical import write_lexical

BLOCK_ROWS = 1 << 14
TRAINED_COPIES = 3
MIN_PART_VECTORS = 1000


def trained_bytes(storage: Storage, trained: TrainedManifest) -> bytes:
    """The empty trained index, its bytes checked against the manifest."""
    if trained.file is None:
        raise ValueError("a flat index has no trained part")
    path = f"{layout.trained(trained.trained)}/{trained.file.name}"
    data = storage.read(path)
    if sha256(data) != trained.file.sha256:
        raise VerificationError(f"{storage.at(path)}: its bytes are not those of its manifest; delete the folder and run again")
    return data


def merge(sources: Sources, version: str) -> MergeRecord:
    """Write the data files of an artifact: vectors and documents in ordinal order, and the index over ordinals."""
    started = time.perf_counter()
    job, trained = sources.job, sources.trained
    give_back()
    with scratch(job.scratch_parent) as folder, frugal_malloc(), _frugal_arrow(), peak_memory() as peak:
        codes = folder / "codes"
        counted = merge_rows(sources, folder / VECTORS, folder, codes)
        give_back()
        lengths = {VECTORS: counted.passages, **{file.name: file.rows for file in counted.documents}}
        vectors = open_vectors(folder / VECTORS, trained.dim)
        rescore = job.config.index.rescore if sources.has_codes else "float16"
        if rescore == "int8":
            write_int8(vectors, folder / INT8)
            lengths[INT8] = counted.passages
        lengths |= _searched_by_words(job, counted, folder)
        give_back()
        index_started = time.perf_counter()
        index_parts = _write_index(sources, vectors, codes, folder)
        index_s = time.perf_counter() - index_started
        lengths |= {part.name: part.count for part in index_parts}
        described = {name: artifact.describe(folder / name, lengths[name]) for name in lengths}
        for name in described:
            job.storage.adopt(f"{layout.artifact(version)}/{name}", folder / name)
    record = MergeRecord(
        version=version,
        dim=trained.dim,
        files=described,
        parts=index_parts,
        documents=tuple(counted.documents),
        rescore=rescore,
        lexical=job.config.index.language if job.config.index.lexical else None,
        columns=job.config.corpus.metadata,
        records=counted.records,
        counts={
            "passages": counted.passages,
            "document_rows": counted.document_rows,
            "shards": len(counted.records),
            "quarantined_rows": counted.rows - counted.document_rows,
            "duplicate_vectors": counted.duplicate_vectors,
        },
        timings_s={"total": time.perf_counter() - started, "index": index_s},
        memory_bytes=peak.size_bytes,
    )
    job.storage.put(layout.run(job.run_id, "merge.json"), to_bytes(record))
    return record


def _searched_by_words(job: Job, counted: Counts, folder: Path) -> dict[str, int]:
    """Write what BM25 and filters need, from the documents just written; returns the files with their rows."""
    documents, columns = Documents(folder, counted.documents), job.config.corpus.metadata
    files: dict[str, int] = {}
    if job.config.index.lexical:
        names = write_lexical(documents.texts(), job.config.index.language, folder)
        files |= dict.fromkeys(names, counted.passages)
    if columns:
        rows = (batch for _, _, batch in documents.batches(["ordinal", "metadata"]))
        write_metadata(rows, columns, folder / METADATA)
        files[METADATA] = counted.document_rows
    return files


@contextlib.contextmanager
def _frugal_arrow() -> Iterator[None]:
    """Arrow on one thread, giving back what it frees: its own allocators keep three times as much."""
    pool, threads = pa.default_memory_pool(), pa.cpu_count()
    pa.set_memory_pool(pa.system_memory_pool())
    pa.set_cpu_count(1)
    try:
        yield
    finally:
        pa.set_memory_pool(pool)
        pa.set_cpu_count(threads)


def part_sizes(config: Config, count: int, entry_bytes: int, trained_size: int) -> list[int]:
    """How many vectors go into each index file, so that making it stays within ``compute.merge_memory``.

    Raises ConfigError when ``index.partitions`` says otherwise, or nothing fits.
    """
    room = config.compute.merge_memory - LIBRARY_BYTES - TRAINED_COPIES * trained_size
    most = room // (MERGE_COPIES * entry_bytes)
    if most < min(count, MIN_PART_VECTORS):
        needed = LIBRARY_BYTES + TRAINED_COPIES * trained_size + MERGE_COPIES * entry_bytes * MIN_PART_VECTORS
        raise ConfigError(f"compute.merge_memory: {config.compute.merge_memory} bytes, this index needs at least {needed}")
    fitting = max(1, -(-count // most))
    wanted = config.index.partitions or fitting
    if wanted < fitting:
        raise ConfigError(
            f"index.partitions: {wanted} of {count} vectors do not fit compute.merge_memory {config.compute.merge_memory}; "
            f"set it to {fitting} or more, or give the merge more memory"
        )
    parts = min(wanted, max(1, count))
    return [count * (number + 1) // parts - count * number // parts for number in range(parts)]


@contextlib.contextmanager
def local_files(job: Job, merged: Merged) -> Iterator[Path]:
    """The merged files as a local folder: in place on a local root, else a verified copy that is gone afterwards.

    Raises VerificationError where one is missing or was cut.
    """
    folder = layout.artifact(merged.version)
    if job.storage.is_local:
        artifact.check_sizes(job.storage, folder, merged.files)
        yield Path(job.storage.at(folder))
        return
    with scratch(job.scratch_parent) as copy:
        for name, file in merged.files.items():
            artifact.fetch_file(job.storage, f"{folder}/{name}", file, copy / name)
        yield copy


def _write_index(sources: Sources, vectors: Vectors, codes: Path, folder: Path) -> tuple[IndexPart, ...]:
    """One index file per part, each over a range of ordinals, one in memory at a time."""
    job, trained = sources.job, sources.trained
    data = trained_bytes(job.storage, trained) if trained.file else None
    entry_bytes = code_bytes(trained.kind, trained.dim, trained.m, trained.nbits) + ID_BYTES
    parts: list[IndexPart] = []
    first = 0
    sizes = part_sizes(job.config, len(vectors), entry_bytes, len(data or b""))
    for number, size in enumerate(sizes):
        name = "index.faiss" if len(sizes) == 1 else f"index-{number:04d}.faiss"
        part = range(first, first + size)
        if sources.has_codes and data:
            made = index.merge(data, trained.kind, _blocks(codes, sources.code_size, part))
        else:
            made = index.build(data, vectors, part)
        index.write(made, folder / name)
        parts.append(IndexPart(name=name, first=first, count=size, mapped=index.can_be_mapped(made)))
        del made
        gc.collect()
        first += size
    return tuple(parts)


def _blocks(file: Path, code_size: int, part: range) -> Iterator[tuple[index.Codes, Ordinals]]:
    """The codes of a range of ordinals, some at a time."""
    with file.open("rb") as codes:
        codes.seek(part.start * code_size)
        for first in range(part.start, part.stop, BLOCK_ROWS):
            end = min(first + BLOCK_ROWS, part.stop)
            block = np.frombuffer(codes.read((end - first) * code_size), dtype=np.uint8).reshape(-1, code_size)
            yield block, np.arange(first, end)
