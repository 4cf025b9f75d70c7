"""Hard negatives from the live artifact: texts that the index finds near a query and that do not answer it.

Positive-aware: a candidate that is nearly as near as the answer itself may be an answer that nobody has judged, so it is
skipped above a share of the answer's cosine (NV-Retriever's TopK-PercPos, arXiv 2407.15831, which found 0.95 best).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.client import Artifact
from pipeline.errors import ConfigError
from pipeline.search.document_files import Documents
from pipeline.search.searcher import Ask, FoundText, Queries
from pipeline.training.pairs import Pair

QUERIES_AT_ONCE = 64


@dataclass(frozen=True)
class Mining:
    """``negatives``: per pair, drawn from the ``depth`` nearest that are left; ``max_share`` of the answer's cosine."""

    negatives: int = 4
    depth: int = 20
    max_share: float = 0.95
    seed: int = 1234


@dataclass(frozen=True)
class Mined:
    """Pairs with their negatives; candidates ``too_near`` to the answer, pairs that have ``fewer`` negatives than asked for."""

    pairs: list[Pair]
    too_near: int
    fewer: int


def judged_pairs(
    artifact: Artifact, documents: Documents, queries: Mapping[str, str], qrels: Mapping[str, Mapping[str, int]], source: str
) -> list[Pair]:
    """A pair for each relevant document of each query: with the one of its passages that is nearest to the query.

    Raises ConfigError where the artifact has none of the documents.
    """
    wanted = [(query, doc) for query, judged in qrels.items() if query in queries for doc, grade in judged.items() if grade > 0]
    texts = documents.texts_of({doc for _, doc in wanted})
    pairs = []
    for query, doc in wanted:
        passages = texts.get(doc, [])
        if len(passages) > 1:
            scores = artifact.encode_documents(passages) @ artifact.encode([queries[query]])[0]
            passages = [passages[int(scores.argmax())]]
        pairs += [Pair(queries[query], passage, query_id=query, doc_id=doc, source=source) for passage in passages]
    if not pairs:
        raise ConfigError(f"{source}: the live artifact has none of the relevant documents; check qrels and doc ids")
    return pairs


def mine(
    artifact: Artifact,
    pairs: Sequence[Pair],
    how: Mining,
    qrels: Mapping[str, Mapping[str, int]] | None = None,
    shown: Mapping[str, str] | None = None,
) -> Mined:
    """Each pair with negatives from the artifact: none of its own answers, and no document that ``qrels`` calls relevant.

    ``shown``: what stands for a document instead of its passage; those that are not in it are no candidates.
    """
    rng = np.random.default_rng(how.seed)
    answers: dict[str, _Answers] = {}
    for pair in pairs:
        own = answers.setdefault(pair.query, _Answers(set(), set()))
        own.texts.add(pair.positive)
        judged = (qrels or {}).get(pair.query_id or "", {})
        own.documents.update(doc for doc in (pair.doc_id, *(doc for doc, grade in judged.items() if grade > 0)) if doc)
    most = max(max(len(own.texts), len(own.documents)) for own in answers.values())
    found: list[Pair] = []
    too_near = 0
    for first in range(0, len(pairs), QUERIES_AT_ONCE):
        batch = pairs[first : first + QUERIES_AT_ONCE]
        vectors = artifact.encode([pair.query for pair in batch])
        cosines = (vectors * artifact.encode_documents([pair.positive for pair in batch])).sum(axis=1)
        near = artifact.opened.searcher.ask(Queries(vectors), Ask(2 * how.depth + most))
        for pair, cosine, candidates in zip(batch, cosines.tolist(), near, strict=True):
            wrong = [each for each in candidates if answers[pair.query].lack(each)]
            left = [each for each in wrong if each.scores["dense"] <= how.max_share * cosine]
            too_near += len(wrong) - len(left)
            texts = [each.text if shown is None else shown.get(each.documents[0].doc_id, "") for each in left]
            pool = list(dict.fromkeys(text for text in texts if text))[: how.depth]
            drawn = rng.choice(len(pool), min(how.negatives, len(pool)), replace=False)
            found.append(replace(pair, negatives=tuple(pool[row] for row in np.sort(drawn))))
    return Mined(found, too_near, sum(len(pair.negatives) < how.negatives for pair in found))


@dataclass(frozen=True)
class _Answers:
    """What is relevant for a query: texts, and documents by id."""

    texts: set[str]
    documents: set[str]

    def lack(self, candidate: FoundText) -> bool:
        return candidate.text not in self.texts and not any(hit.doc_id in self.documents for hit in candidate.documents)
