"""Approximate nearest neighbours: indexes trained, filled, merged, searched and measured. The FAISS room."""
