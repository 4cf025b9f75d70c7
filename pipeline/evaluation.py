"""Retrieval quality by human judgements: queries, qrels, nDCG@10, MRR@10, recall@100 (ir-measures)."""

import csv
import gzip
import io
import json
from collections.abc import Collection, Mapping, Sequence

import ir_measures
import numpy as np
import numpy.typing as npt
from ir_measures import RR, R, nDCG

from pipeline.config import StoreConfig
from pipeline.errors import ConfigError
from pipeline.model import EncoderSpec
from pipeline.recall import Matrix
from pipeline.searcher import Searcher
from pipeline.storage import Storage

LABELLED_DEPTH = 100


def read_queries(uri: str, store: StoreConfig) -> dict[str, str]:
    """Queries of a JSONL file (``_id`` or ``id``, ``text``), plain or .gz; raises ConfigError naming file and line."""
    queries: dict[str, str] = {}
    for number, line in enumerate(_read_text(uri, store).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                queries[str(row["_id"] if "_id" in row else row["id"])] = str(row["text"])
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{uri}: line {number} is no query, expected _id and text, {error!r}; mend the line"
                ) from error
    return queries


def read_qrels(uri: str, store: StoreConfig) -> dict[str, dict[str, int]]:
    """Judgements of a TSV file: query-id, corpus-id, score (BEIR), or TREC's four columns; a header line is skipped."""
    qrels: dict[str, dict[str, int]] = {}
    for number, row in enumerate(csv.reader(io.StringIO(_read_text(uri, store)), delimiter="\t"), 1):
        if not row or (number == 1 and not row[-1].lstrip("-").isdigit()):
            continue
        try:
            query, document, score = row if len(row) == 3 else (row[0], row[2], row[3])
            qrels.setdefault(query, {})[document] = int(score)
        except (ValueError, IndexError) as error:
            raise ConfigError(
                f"{uri}: line {number} is no judgement, expected query-id, corpus-id, score; mend the line"
            ) from error
    return qrels


def ir_metrics(qrels: Mapping[str, Mapping[str, int]], ranked: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """nDCG@10, MRR@10 and recall@100 of ranked doc_ids, over the judged queries, by ir-measures (trec_eval).

    Ranks are given as scores, because trec_eval orders equal scores by its own rule.
    """
    run = {query: {doc: float(-rank) for rank, doc in enumerate(ranked.get(query, ()))} for query in qrels}
    values = ir_measures.calc_aggregate([nDCG @ 10, RR @ 10, R @ 100], qrels, run)
    return {"ndcg@10": float(values[nDCG @ 10]), "mrr@10": float(values[RR @ 10]), "recall@100": float(values[R @ 100])}


def _read_text(uri: str, store: StoreConfig) -> str:
    folder, _, name = uri.rpartition("/")
    try:
        data = Storage(folder or ".", store).read(name)
    except FileNotFoundError as error:
        raise ConfigError(f"{uri}: no such file; check the path") from error
    return (gzip.decompress(data) if uri.endswith(".gz") else data).decode("utf-8-sig")


def labelled(
    searcher: Searcher, queries: Mapping[str, Matrix], qrels: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, float]]:
    """Metrics of exact search and of the index, for judged queries given as (dim,) unit vectors.

    Passages are rolled up to documents by their best score, equal texts to all their doc_ids, before the cut.
    """
    ranked: dict[str, dict[str, list[str]]] = {"exact": {}, "index": {}}
    names = sorted(qrels.keys() & queries.keys())
    vectors = np.stack([queries[name] for name in names])
    for kind, found in ranked.items():
        answers = searcher.search(vectors, LABELLED_DEPTH, exact=kind == "exact")
        found.update({name: [hit.doc_id for hit in hits] for name, hits in zip(names, answers, strict=True)})
    return {kind: ir_metrics(qrels, found) for kind, found in ranked.items()}


def encode_queries(
    spec: EncoderSpec, uri: str, store: StoreConfig, only: Collection[str] | None = None
) -> dict[str, npt.NDArray[np.float32]]:
    """Read and encode a query file on this machine: query id -> (dim,). ``only``: leave out other ids."""
    from pipeline.encoder import load_query_encoder

    queries = {name: text for name, text in read_queries(uri, store).items() if only is None or name in only}
    if not queries:
        raise ConfigError(f"{uri}: no query that is judged; check queries and qrels")
    vectors = load_query_encoder(spec).encode_queries(list(queries.values()))
    return dict(zip(queries, vectors, strict=True))
