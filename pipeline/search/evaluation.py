"""Retrieval quality of an artifact by human judgements: exact search, the index, BM25 and hybrid."""

from collections.abc import Sequence

from pipeline.ann.recall import Matrix
from pipeline.config import StoreConfig
from pipeline.encoding.model import EncoderSpec
from pipeline.search.judgements import chosen_queries, ir_metrics, read_qrels
from pipeline.search.searcher import Ask, FoundText, Queries, Searcher, documents

LABELLED_DEPTH = 100


def labelled(
    searcher: Searcher, spec: EncoderSpec, queries: str, qrels: str, store: StoreConfig
) -> dict[str, dict[str, float]]:
    """Metrics of exact search and of the index; of BM25 and of both fused too, where the artifact has it.

    ``queries``, ``qrels``: URIs. Passages are rolled up to documents by their best score, equal texts to all their doc_ids,
    before the cut.
    """
    judgements = read_qrels(qrels, store)
    texts = chosen_queries(queries, store, judgements.keys())
    asked = Queries(_encoded(spec, list(texts.values())), list(texts.values()))
    asks = {"exact": Ask(LABELLED_DEPTH, exact=True), "index": Ask(LABELLED_DEPTH)}
    if searcher.has_lexical:
        asks |= {"lexical": Ask(LABELLED_DEPTH, mode="lexical"), "hybrid": Ask(LABELLED_DEPTH, mode="hybrid")}
    metrics = {}
    for kind, ask in asks.items():
        answers = zip(texts, searcher.ask(asked, ask), strict=True)
        ranked = {name: ranked_documents(found) for name, found in answers}
        metrics[kind] = ir_metrics(judgements, ranked)
    return metrics


def ranked_documents(found: Sequence[FoundText]) -> list[str]:
    """Ids of the documents of an answer, in order, as many as are judged."""
    return [hit.doc_id for hit in documents(found)[:LABELLED_DEPTH]]


def encode_queries(spec: EncoderSpec, uri: str, store: StoreConfig) -> Matrix:
    """Read and encode a query file on this machine: (q, dim) unit vectors."""
    return _encoded(spec, list(chosen_queries(uri, store, None).values()))


def _encoded(spec: EncoderSpec, texts: list[str]) -> Matrix:
    from pipeline.encoder import load_query_encoder

    return load_query_encoder(spec).encode_queries(texts)
