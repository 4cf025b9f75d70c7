"""What a re-ranker thinks of training pairs, for a bi-encoder to learn (MarginMSE, arXiv 2010.02666)."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipeline.config import Config
from pipeline.encoding.model_files import hash_files, locate
from pipeline.errors import EncoderError
from pipeline.search.reranker import KEYS, load_reranker
from pipeline.search.reranking import named
from pipeline.training.pairs import Pair


def teacher_of(config: Config) -> str:
    """What identifies ``search.reranker``: the hash of its files. Raises ConfigError where there is none."""
    return hash_files(str(locate(named(config.search), config.search.reranker_revision, KEYS)))


def taught(pairs: Sequence[Pair], config: Config) -> list[Pair]:
    """The same pairs with the scores of ``search.reranker``, as it gives them before any activation.

    Raises ConfigError where there is no such model, EncoderError for a text that it has no score for.
    """
    model, trusted = named(config.search), config.encoder.trust_remote_code
    teacher = load_reranker(model, config.search.reranker_revision, trust_remote_code=trusted, activated=False)
    scored = []
    for number, pair in enumerate(pairs):
        scores = teacher.score(pair.query, [pair.positive, *pair.negatives])
        if not np.isfinite(scores).all():
            raise EncoderError(f"{model}: no score for a text of pair {number}; leave the pair out")
        scored.append(replace(pair, scores=tuple(scores.tolist())))
    return scored
