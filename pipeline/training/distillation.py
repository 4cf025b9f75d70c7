"""What a cross-encoder thinks of training pairs, for a bi-encoder to learn (MarginMSE, arXiv 2010.02666)."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.reranker import load_reranker
from pipeline.reranking import NOT_NAMED
from pipeline.training.pairs import Pair


def taught(pairs: Sequence[Pair], config: Config) -> list[Pair]:
    """Pairs that have negatives, with the scores of ``search.reranker``. Raises ConfigError where there is none of either."""
    search = config.search
    if search.reranker is None:
        raise ConfigError(NOT_NAMED)
    teacher = load_reranker(search.reranker, search.reranker_revision, trust_remote_code=config.encoder.trust_remote_code)
    scored = []
    for pair in pairs:
        if pair.negatives:
            scores = teacher.score(pair.query, [pair.positive, *pair.negatives])
            if np.isfinite(scores).all():
                scored.append(replace(pair, scores=tuple(scores.tolist())))
    if not scored:
        raise ConfigError("distill: no pair has a negative that the cross-encoder can score; vecmill mine finds negatives")
    return scored
