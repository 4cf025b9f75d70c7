"""The loop that makes a corpus's own models: pairs, hard negatives from the live artifact, training."""
