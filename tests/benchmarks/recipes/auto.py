"""The script's vectors, and autofaiss for the index half: CORPUS OUT MODEL."""

import json
import sys
from pathlib import Path

import faiss
import numpy as np
from autofaiss import build_index
from sentence_transformers import SentenceTransformer

if __name__ == "__main__":
    corpus, out, model = sys.argv[1:]
    rows = [json.loads(line) for file in sorted(Path(corpus).glob("*.jsonl")) for line in file.open()]
    encoder = SentenceTransformer(model)
    vectors = encoder.encode([row["text"] for row in rows], batch_size=32, normalize_embeddings=True)
    np.save(f"{out}/vectors.npy", vectors)
    matrix = faiss.OPQMatrix
    faiss.OPQMatrix = lambda d, **m_and_d2: matrix(d, *m_and_d2.values())  # autofaiss 2.18 names what FAISS 1.15 does not
    index, _ = build_index(
        vectors,
        save_on_disk=False,
        metric_type="ip",
        max_index_memory_usage=f"{len(vectors) * 64 // 1000}KB",
        current_memory_available="4G",
    )
    faiss.write_index(index, f"{out}/index.faiss")
    Path(f"{out}/ids.json").write_text(json.dumps([row["id"] for row in rows]))
