"""The same with the multi-process pool of sentence-transformers: CORPUS OUT MODEL."""

import json
import os
import sys
from pathlib import Path

import faiss
import numpy as np
from sentence_transformers import SentenceTransformer

os.environ["OMP_NUM_THREADS"] = "1"

if __name__ == "__main__":
    corpus, out, model = sys.argv[1:]
    rows = [json.loads(line) for file in sorted(Path(corpus).glob("*.jsonl")) for line in file.open()]
    encoder = SentenceTransformer(model)
    pool = encoder.start_multi_process_pool(["cpu", "cpu"])
    texts = [row["text"] for row in rows]
    vectors = encoder.encode(texts, pool=pool, batch_size=32, chunk_size=1000, normalize_embeddings=True)
    encoder.stop_multi_process_pool(pool)
    index = faiss.index_factory(vectors.shape[1], "IVF256,PQ48", faiss.METRIC_INNER_PRODUCT)
    index.do_polysemous_training = False
    index.train(vectors)
    index.add(vectors)
    faiss.write_index(index, f"{out}/index.faiss")
    np.save(f"{out}/vectors.npy", vectors)
    Path(f"{out}/ids.json").write_text(json.dumps([row["id"] for row in rows]))
