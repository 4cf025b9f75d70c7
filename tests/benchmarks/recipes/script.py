"""sentence-transformers and FAISS in a script, as tutorials have it: CORPUS OUT MODEL."""

import json
import sys
from pathlib import Path

import faiss
import numpy as np
from sentence_transformers import SentenceTransformer

corpus, out, model = sys.argv[1:]
rows = [json.loads(line) for file in sorted(Path(corpus).glob("*.jsonl")) for line in file.open()]
encoder = SentenceTransformer(model)
vectors = encoder.encode([row["text"] for row in rows], batch_size=32, normalize_embeddings=True)
index = faiss.index_factory(vectors.shape[1], "IVF256,PQ48", faiss.METRIC_INNER_PRODUCT)
index.do_polysemous_training = False
index.train(vectors)
index.add(vectors)
faiss.write_index(index, f"{out}/index.faiss")
np.save(f"{out}/vectors.npy", vectors)
Path(f"{out}/ids.json").write_text(json.dumps([row["id"] for row in rows]))
