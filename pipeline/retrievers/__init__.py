"""An artifact as a retriever of other frameworks; each needs its own package, an extra of vecmill."""
