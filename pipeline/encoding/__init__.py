"""A text becomes a vector: model files, tokens, batches, engines. Knows nothing of roots, Ray or FAISS."""
