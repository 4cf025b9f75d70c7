"""Daft's embed_text, then FAISS: CORPUS OUT MODEL."""

import json
import sys
from pathlib import Path

import daft
import faiss
import numpy as np
import pyarrow.parquet as pq
from daft.functions import embed_text

corpus, out, model = sys.argv[1:]
rows = daft.read_json(f"{corpus}/*.jsonl")
rows = rows.with_column("embedding", embed_text(daft.col("text"), provider="transformers", model=model))
rows.write_parquet(f"{out}/parquet", write_mode="overwrite")
table = pq.read_table(f"{out}/parquet")
vectors = np.array(table["embedding"].to_pylist(), dtype=np.float32)
faiss.normalize_L2(vectors)
index = faiss.index_factory(vectors.shape[1], "IVF256,PQ48", faiss.METRIC_INNER_PRODUCT)
index.do_polysemous_training = False
index.train(vectors)
index.add(vectors)
faiss.write_index(index, f"{out}/index.faiss")
np.save(f"{out}/vectors.npy", vectors)
Path(f"{out}/ids.json").write_text(json.dumps(table["id"].to_pylist()))
