"""A snapshot becomes embeddings: what the store lacks, units of it, shards."""
