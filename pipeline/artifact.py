"""The servable folder: assembled once, verified by hash, opened anywhere, searched.

Files: ``index.faiss`` (ids are ordinals), ``vectors.f16`` (n x dim little-endian float16 in ordinal order),
``documents.parquet`` (ordinal -> every document and passage with that text), ``manifest.json``. No pickle.
A folder without a manifest is no artifact; a published one is never touched again.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import layout
from pipeline.embeddings import is_among, vectors_of
from pipeline.errors import VerificationError
from pipeline.fingerprint import sha256_file
from pipeline.manifest import ArtifactManifest, DataFile, parse
from pipeline.shards import Keys, keys_of, merge_by_key
from pipeline.snapshot import PASSAGE_SCHEMA
from pipeline.storage import Storage

MANIFEST = "manifest.json"
RANGE_PASSAGES = 1 << 14
"""Passages per step of the merge by key: bounds its memory."""
DOCUMENT_ROW_GROUP = 512
"""Rows read to show one hit."""
READ_BYTES = 8 << 20

DOCUMENTS_SCHEMA = pa.schema(
    [
        pa.field("ordinal", pa.int64(), nullable=False),
        *(field for field in PASSAGE_SCHEMA if field.name not in {"key", "tokens"}),
    ]
)


def write_vectors(storage: Storage, shards: Sequence[tuple[str, DataFile]], live: Keys, dim: int, file: Path) -> None:
    """Merge embedding shards (in name order) into ordinal order, live keys only, the first of equal keys.

    Raises VerificationError when a live key has no vector.
    """
    done = 0
    with file.open("wb") as out:
        ranges = zip(key_ranges(live), merge_by_key(storage, shards, ["key", "embedding"], key_bounds(live)), strict=True)
        for wanted, table in ranges:
            keys, first = np.unique(keys_of(table.column("key")), return_index=True)  # the lowest shard name
            if not is_among(wanted, keys).all():
                break
            rows = first[np.searchsorted(keys, wanted)]
            out.write(vectors_of(table.column("embedding"), dim)[rows].tobytes())
            done += len(wanted)
    if done != len(live):
        raise VerificationError(f"{storage.uri}: only {done} of {len(live)} passages have a vector; run embed again")


def write_documents(storage: Storage, parts: Sequence[DataFile], live: Keys, file: Path) -> int:
    """Merge snapshot parts into ordinal order, live keys only; equal texts follow each other by doc_id. Returns the rows."""
    columns = [name for name in PASSAGE_SCHEMA.names if name != "tokens"]
    rows = 0
    order = [("ordinal", "ascending"), ("doc_id", "ascending"), ("passage", "ascending")]
    with pq.ParquetWriter(file, DOCUMENTS_SCHEMA, compression="zstd", write_page_checksum=True) as writer:
        for table in merge_by_key(storage, [(layout.PASSAGES, part) for part in parts], columns, key_bounds(live)):
            found = table.filter(pa.array(is_among(keys_of(table.column("key")), live)))
            ordinals = pa.array(np.searchsorted(live, keys_of(found.column("key"))))
            documents = found.drop_columns(["key"]).add_column(0, DOCUMENTS_SCHEMA.field("ordinal"), ordinals)
            writer.write_table(documents.sort_by(order).cast(DOCUMENTS_SCHEMA), row_group_size=DOCUMENT_ROW_GROUP)
            rows += found.num_rows
    return rows


def key_bounds(live: Keys) -> list[bytes]:
    """Keys that cut the sorted live keys into ranges of RANGE_PASSAGES."""
    raw = live.tobytes()
    width = live.dtype.itemsize
    return [raw[at * width : (at + 1) * width] for at in range(RANGE_PASSAGES, len(live), RANGE_PASSAGES)]


def key_ranges(live: Keys) -> Iterator[Keys]:
    """The live keys of each range of ``key_bounds``."""
    for first in range(0, max(1, len(live)), RANGE_PASSAGES):
        yield live[first : first + RANGE_PASSAGES]


def describe(file: Path, rows: int) -> DataFile:
    """Size and hash of a finished local file."""
    return DataFile(name=file.name, rows=rows, size_bytes=file.stat().st_size, sha256=sha256_file(file))


def read_manifest(data: bytes, where: str) -> ArtifactManifest:
    """Parse a manifest and check its own checksum; raises VerificationError naming the file."""
    manifest = parse(ArtifactManifest, data, where)
    manifest.check(where)
    return manifest


def verify(storage: Storage, folder: str) -> ArtifactManifest:
    """Read every byte of an artifact back; raises VerificationError naming the first file that is wrong, missing or foreign."""
    path = f"{folder}/{MANIFEST}".lstrip("/")
    try:
        manifest = read_manifest(storage.read(path), storage.at(path))
    except FileNotFoundError as error:
        raise VerificationError(f"{storage.at(folder)}: no {MANIFEST}, so no artifact; check the path") from error
    for name, expected in manifest.files.items():
        verify_file(storage, f"{folder}/{name}".lstrip("/"), expected)
    found = {path.rpartition("/")[2] for path in storage.list(folder)}
    if strangers := found - set(manifest.files) - {MANIFEST}:
        raise VerificationError(f"{storage.at(folder)}/{min(strangers)}: not in the manifest; remove it")
    return manifest


def verify_file(storage: Storage, path: str, expected: DataFile) -> None:
    """Read a file back; raises VerificationError unless size and SHA-256 are the expected ones."""
    digest = hashlib.sha256()
    try:
        with storage.open(path) as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
    except FileNotFoundError as error:
        raise VerificationError(
            f"{storage.at(path)}: missing, the manifest lists it; restore or rebuild the artifact"
        ) from error
    if digest.hexdigest() != expected.sha256:
        raise VerificationError(f"{storage.at(path)}: its bytes are not those of the manifest; restore or rebuild the artifact")
