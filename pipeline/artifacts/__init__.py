"""Embeddings become a servable folder: merged, measured, verified, published, opened."""
