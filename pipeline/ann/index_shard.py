"""The index shard: FAISS codes of one embedding shard, row by row, in Parquet that names its trained index."""

from typing import Any

import pyarrow as pa

from pipeline.errors import VerificationError
from pipeline.root import layout
from pipeline.root.manifest import Record, TrainedManifest, load, put_data, put_record
from pipeline.root.shards import Cursor, fixed_binary, parquet_bytes
from pipeline.root.storage import Storage

TRAINED = b"vecmill.trained"


def put_codes(storage: Storage, trained: TrainedManifest, unit: str, codes: Any, **record: Any) -> Record:
    """Write (n, code size) uint8 codes and then their record; what is given besides goes into the record."""
    field = pa.field("code", pa.binary(codes.shape[1]), nullable=False)
    schema = pa.schema([field], metadata={TRAINED: trained.trained.encode()})
    folder = layout.index_shards(trained.trained)
    data = parquet_bytes(pa.table({"code": fixed_binary(codes)}, schema=schema), compress=False)
    file = put_data(storage, f"{folder}/{unit}", ".parquet", data, len(codes))
    counts = {"vectors": len(codes)}
    return put_record(storage, folder, Record(unit=unit, files=(file,), counts=counts, **record))


def open_codes(storage: Storage, trained: TrainedManifest, shard: Record, code_size: int, ahead_bytes: int) -> Cursor | None:
    """The codes of an embedding shard, to be read forward; None where it has none.

    Raises VerificationError when they are of another trained index, size or number of rows.
    """
    folder = layout.index_shards(trained.trained)
    record = load(Record, storage, f"{folder}/{shard.unit}.json")
    if record is None:
        return None
    file = record.files[0]
    cursor = Cursor(storage, folder, file, ["code"], ahead_bytes=ahead_bytes)
    found = (
        (cursor.schema.metadata or {}).get(TRAINED, b"none").decode(),
        cursor.schema.field("code").type.byte_width,
        file.rows,
    )
    expected = (trained.trained, code_size, shard.files[0].rows)
    if found != expected:
        raise VerificationError(
            f"{storage.at(folder)}/{file.name}: codes of trained index {found[0]}, {found[1]} bytes each, {found[2]} rows; "
            f"expected {expected[0]}, {expected[1]} bytes, {expected[2]} rows; delete its record and run again"
        )
    return cursor
