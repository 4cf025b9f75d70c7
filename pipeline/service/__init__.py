"""The search service: one artifact answers over HTTP, and is replaced by the next one without a failed request."""
