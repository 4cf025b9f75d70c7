"""What people judged: queries, qrels, and rankings measured by them with ir-measures."""

import gzip
import json
import zlib
from collections.abc import Collection, Mapping, Sequence

import ir_measures
from ir_measures import RR, R, nDCG

from pipeline.config import StoreConfig
from pipeline.errors import ConfigError
from pipeline.root.storage import file_at

QRELS_METRICS = {"ndcg@10": nDCG @ 10, "mrr@10": RR @ 10, "recall@100": R @ 100}


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
    for number, line in enumerate(_read_text(uri, store).split("\n"), 1):
        row = line.rstrip("\r").split("\t")
        if not line.strip() or (number == 1 and not row[-1].lstrip("-").isdigit()):
            continue
        try:
            query, document, score = row if len(row) == 3 else (row[0], row[2], row[3])
            qrels.setdefault(query, {})[document] = int(score)
        except (ValueError, IndexError) as error:
            raise ConfigError(
                f"{uri}: line {number} is no judgement, expected query-id, corpus-id, score; mend the line"
            ) from error
    return qrels


def metrics_by_query(
    qrels: Mapping[str, Mapping[str, int]], ranked: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, float]]:
    """nDCG@10, MRR@10 and recall@100 of ranked doc_ids for each judged query, by ir-measures (trec_eval).

    Ranks are given as scores, because trec_eval orders equal scores by its own rule.
    """
    run = {query: {doc: float(-rank) for rank, doc in enumerate(ranked.get(query, ()))} for query in qrels}
    found = {name: dict.fromkeys(qrels, 0.0) for name in QRELS_METRICS}
    names = {measure: name for name, measure in QRELS_METRICS.items()}
    for each in ir_measures.iter_calc(list(names), qrels, run):
        found[names[each.measure]][each.query_id] = float(each.value)
    return found


def ir_metrics(qrels: Mapping[str, Mapping[str, int]], ranked: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Means of ``metrics_by_query`` over the judged queries."""
    return {name: sum(values.values()) / len(values) for name, values in metrics_by_query(qrels, ranked).items()}


def chosen_queries(uri: str, store: StoreConfig, only: Collection[str] | None) -> dict[str, str]:
    """The queries of a file, or those ``only``; ConfigError where there is none."""
    queries = {name: text for name, text in read_queries(uri, store).items() if only is None or name in only}
    if not queries:
        raise ConfigError(f"{uri}: no query that is judged; check queries and qrels")
    return queries


def _read_text(uri: str, store: StoreConfig) -> str:
    storage, name = file_at(uri, store)
    try:
        data = storage.read(name)
    except FileNotFoundError as error:
        raise ConfigError(f"{uri}: no such file; check the path") from error
    try:
        return (gzip.decompress(data) if uri.endswith(".gz") else data).decode("utf-8-sig")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(f"{uri}: not UTF-8, or not gzip as its name says, {error}; write it again") from error
