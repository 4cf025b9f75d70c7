"""Queries become documents: BM25, filters, fusion, re-ranking; and how good that is by judgements."""
