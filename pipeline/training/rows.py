"""Training pairs as the rows that losses take."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.errors import ConfigError
from pipeline.training.pairs import Pair
from pipeline.training.recipe import Recipe

SHOWN_CHARS = 60


def contrastive_rows(pairs: Sequence[Pair], recipe: Recipe) -> list[dict[str, Any]]:
    """Columns query, positive, negative_0 and on, as the contrastive loss takes them."""
    if not any(pair.negatives for pair in pairs) or not recipe.negatives:
        return [{"query": pair.query, "positive": pair.positive} for pair in pairs]
    return [
        {"query": pair.query, "positive": pair.positive} | {f"negative_{number}": text for number, text in enumerate(negatives)}
        for pair, negatives in with_negatives(pairs, recipe)
    ]


def with_negatives(pairs: Sequence[Pair], recipe: Recipe) -> list[tuple[Pair, list[str]]]:
    """Each pair with as many negatives as any has, at most ``recipe.negatives``: what one lacks is any other text."""
    count = min(recipe.negatives, max(len(pair.negatives) for pair in pairs))
    rng = np.random.default_rng(recipe.seed)
    every = sorted({text for pair in pairs for text in (pair.positive, *pair.negatives)})
    answers: dict[str, set[str]] = {}
    for pair in pairs:
        answers.setdefault(pair.query, set()).add(pair.positive)
    filled = []
    for pair in pairs:
        own = list(pair.negatives[:count])
        taken = {*own, *answers[pair.query]}
        if len(every) - len(taken) < count - len(own):
            raise ConfigError(f"pairs: too few texts for {count} negatives of {pair.query[:SHOWN_CHARS]!r}; use fewer")
        while len(own) < count:
            text = every[int(rng.integers(len(every)))]
            if text not in taken:
                own.append(text)
                taken.add(text)
        filled.append((pair, own))
    return filled


def distilled_rows(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """One row for each negative of each pair, labelled with how much better the teacher finds the answer."""
    rows = [
        {"query": pair.query, "positive": pair.positive, "negative": negative, "label": pair.scores[0] - score}
        for pair in pairs
        for negative, score in zip(pair.negatives, pair.scores[1:], strict=bool(pair.scores))
    ]
    if not rows or len({row["label"] for row in rows}) == 1:
        raise ConfigError("pairs: no scores of a teacher that tell answers and negatives apart")
    return rows
