"""Ray Data's recipe for batch embeddings, an actor with a model under map_batches, then FAISS: CORPUS OUT MODEL."""

import json
import sys
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq
import ray

corpus, out, model = sys.argv[1:]


class Embedder:
    def __init__(self):
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(model)

    def __call__(self, batch):
        batch["embedding"] = self.model.encode(list(batch["text"]), batch_size=32, normalize_embeddings=True)
        return batch


ray.init(num_cpus=2, include_dashboard=False)
rows = ray.data.read_json(corpus, file_extensions=["jsonl"], override_num_blocks=16)
rows = rows.map_batches(Embedder, batch_size=512, concurrency=2, num_cpus=0.5)
rows.write_parquet(f"{out}/parquet", mode="overwrite")
table = pq.read_table(f"{out}/parquet")
vectors = np.array(table["embedding"].to_pylist(), dtype=np.float32)
index = faiss.index_factory(vectors.shape[1], "IVF256,PQ48", faiss.METRIC_INNER_PRODUCT)
index.do_polysemous_training = False
index.train(vectors)
index.add(vectors)
faiss.write_index(index, f"{out}/index.faiss")
np.save(f"{out}/vectors.npy", vectors)
Path(f"{out}/ids.json").write_text(json.dumps(table["id"].to_pylist()))
