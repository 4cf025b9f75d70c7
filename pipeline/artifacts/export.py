"""The live documents with their vectors as one Parquet file that any tool reads: ``fixed_size_list`` of floats."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.ann.vectors import to_float32
from pipeline.artifacts.live import open_live
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.root.job import scratch
from pipeline.root.storage import file_at

COLUMNS = ["ordinal", "doc_id", "passage", "start", "end", "text", "metadata"]


def export(config: Config, out: str, *, as_float32: bool = False, with_text: bool = True) -> int:
    """Write a row per document and passage of the live artifact to ``out`` (any URI, replaced); returns how many.

    ``embedding``: the stored unit vector, ``fixed_size_list<float16|float32>[dim]``. Documents with one text are rows of their
    own with the same vector. Raises ConfigError where nothing is live.
    """
    opened = open_live(config)
    vectors = opened.partition.collection.vectors
    columns = [name for name in COLUMNS if with_text or name != "text"]
    target, name = file_at(out, config.store)
    if not name:
        raise ConfigError(f"{out}: a folder; name the Parquet file to write")
    rows = 0
    writer = None
    with scratch(config.compute.scratch) as folder:
        file = folder / "export.parquet"
        for _, _, batch in opened.partition.documents.batches(columns):
            found = vectors[batch.column("ordinal").to_numpy()]
            flat = (to_float32(found) if as_float32 else np.ascontiguousarray(found)).reshape(-1)
            embedding = pa.FixedSizeListArray.from_arrays(pa.array(flat), vectors.shape[1])
            table = pa.Table.from_batches([batch]).drop_columns(["ordinal"]).append_column("embedding", embedding)
            writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd", write_page_checksum=True)
            writer.write_table(table)
            rows += len(table)
        if writer is None:
            raise ConfigError(f"{config.root}: the live artifact has no document to export")
        writer.close()
        target.adopt(name, file)
    return rows
