"""The config: what to build, how to run it, when it may go live, how it answers.

Strict: an unknown key is an error with a suggestion. Only *what* (config_what) is ever fingerprinted; *how* (compute, store)
never is, so it can change without invalidating work.
"""

import re
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import ByteSize, Field, SecretStr, model_validator

from pipeline.config_what import CorpusConfig, EncoderConfig, IndexConfig, PassagesConfig, Section
from pipeline.encoding.model import UNLIMITED_TOKENS


class EvaluationConfig(Section):
    """How recall is measured before anything goes live."""

    sample: int = Field(1000, ge=1, description="Passages used as queries, chosen by key hash, kept out of training")
    k: int = Field(10, ge=1, description="Neighbours compared: recall@k")
    queries: str | None = Field(None, description="JSONL of queries (_id, text) used instead of sampled passages")
    qrels: str | None = Field(None, description="TSV of judgements (query-id, corpus-id, score) for nDCG, MRR, recall")

    @model_validator(mode="after")
    def _qrels_with_queries(self) -> "EvaluationConfig":
        if self.qrels and not self.queries:
            raise ValueError("qrels without queries; set evaluation.queries too")
        return self


class PublishConfig(Section):
    """When a new artifact may go live."""

    min_recall: float = Field(0.0, ge=0, le=1, description="Recall@k under this stops the commit, exit 5")
    max_shrink: float = Field(
        0.2, ge=0, le=1, description="So large a share of the live documents may be gone; more stops the run, exit 3"
    )


class SearchConfig(Section):
    """How the live artifact answers."""

    k: int = Field(10, ge=1, le=10_000, description="Documents per query")
    mode: Literal["dense", "lexical", "hybrid"] = Field(
        "dense", description="By vectors, by words (BM25), or both fused; the latter two need index.lexical"
    )
    fusion: Literal["rrf", "weighted"] = Field(
        "rrf", description="How hybrid joins the two: by ranks (reciprocal rank fusion) or by scores scaled to 0..1"
    )
    dense_weight: float = Field(0.5, ge=0, le=1, description="Share of the vectors in hybrid, the rest is of the words")
    nprobe: int | None = Field(None, ge=1, description="Lists visited; default: the measured point of the artifact")
    rescore: int | None = Field(
        None, ge=0, description="Candidates per asked neighbour re-scored exactly, 0 for none; default: the measured point"
    )
    max_latency_ms: float | None = Field(
        None, gt=0, description="Search settings are chosen within this time of one query on one thread; default: no limit"
    )
    reranker: str | None = Field(
        None, description="Cross-encoder or model of late interaction (ColBERT), named like encoder.model; default: none"
    )
    reranker_revision: str | None = Field(None, description="Commit of a hub reranker; required for a hub id")
    rerank_depth: int = Field(50, ge=1, le=1000, description="Texts per query that the reranker scores, the best of the search")
    rerank_ms: float | None = Field(
        None,
        gt=0,
        description="Time box of the reranker per query: texts that it does not get to keep their order, below those that it "
        "scored; default: no limit",
    )
    cache_dir: str | None = Field(None, description="Where artifacts of remote roots are kept; default: ~/.cache/vecmill")
    cache_size: ByteSize = Field(
        cast(ByteSize, "50GB"),
        validate_default=True,
        description="Room for them: the longest unused go for a new one, never one that is in use",
    )

    @model_validator(mode="after")
    def _reranker_revision_with_reranker(self) -> "SearchConfig":
        if self.reranker_revision and not self.reranker:
            raise ValueError("reranker_revision without reranker; set search.reranker too")
        return self


class ServeConfig(Section):
    """How the search service answers; its limits are told by GET /info."""

    max_body: ByteSize = Field(
        cast(ByteSize, "1MB"), validate_default=True, description="Bytes of a request's body; more is refused, 413"
    )
    max_queries: int = Field(128, ge=1, description="Queries or texts per request")
    max_query_chars: int = Field(8192, ge=1, description="Characters of one query or text")
    max_k: int = Field(1000, ge=1, le=10_000, description="Texts per query")
    max_hits: int = Field(10_000, ge=1, description="Queries times k of one request")
    queue: int = Field(256, ge=1, description="Texts that wait for the encoder, searches that wait for a thread; more: 429")
    threads: int | None = Field(None, ge=1, description="Searches side by side, one thread each; default: one per CPU")
    timeout_s: float = Field(10.0, gt=0, description="A request that takes longer is given up: 408 for its body, else 503")
    poll_s: float = Field(5.0, gt=0, description="How often the log is asked for a new commit")


class S3Config(Section):
    """Where s3:// is, when the environment does not say it."""

    endpoint_url: str | None = Field(None, description="Default: $AWS_ENDPOINT_URL, else AWS")
    region: str | None = Field(None, description="Default: the environment's")
    key: SecretStr | None = Field(None, description="Access key id; better: $AWS_ACCESS_KEY_ID or a role")
    secret: SecretStr | None = Field(None, description="Secret key; better: $AWS_SECRET_ACCESS_KEY or a role")


class StoreConfig(Section):
    """Where things are kept."""

    embeddings: str | None = Field(None, description="Embedding store shared with other roots; default: under the root")
    s3: S3Config = Field(default_factory=S3Config, description="S3 endpoint and credentials")


class ComputeConfig(Section):
    """How the job runs. Nothing here changes a result."""

    address: str | None = Field(None, description="Ray address; default: $RAY_ADDRESS, else a local Ray is started")
    encoders: int | None = Field(None, ge=1, description="Encoder actors; default: one per GPU, without GPUs one per node")
    gpus_per_encoder: float | None = Field(None, ge=0, description="Default: 1 where the cluster has GPUs, else 0")
    cpus_per_encoder: int | None = Field(None, ge=1, description="Threads of an encoder; default: an equal share of a node")
    unit_passages: int | None = Field(None, ge=1, description="Passages per embedding shard; default: by corpus and pool")
    merge_memory: ByteSize = Field(
        cast(ByteSize, "4GB"),
        validate_default=True,
        description="Memory of the merge, 128 MiB of it for libraries; an index that needs more is cut into several files",
    )
    scratch: str | None = Field(
        None, description="Local folder for files in the making; default: the system's temp folder, for a merge a local root"
    )
    lease_ttl_s: float = Field(30.0, gt=0, description="A writer without a heartbeat for so long is taken for dead")


class Config(Section):
    """One root: one corpus, one encoder, one live index."""

    root: str = Field(description="Folder of this index: any fsspec URI")
    corpus: CorpusConfig
    passages: PassagesConfig = Field(default_factory=PassagesConfig)
    encoder: EncoderConfig = Field(default_factory=EncoderConfig)
    index: IndexConfig = Field(default_factory=IndexConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    publish: PublishConfig = Field(default_factory=PublishConfig)
    search: SearchConfig = Field(default_factory=SearchConfig)
    serve: ServeConfig = Field(default_factory=ServeConfig)
    store: StoreConfig = Field(default_factory=StoreConfig)
    compute: ComputeConfig = Field(default_factory=ComputeConfig)

    def encoder_request(self) -> dict[str, Any]:
        """What ``model.resolve_spec`` is asked for, precision and backend apart."""
        passages, asked = self.passages, self.encoder.model_dump(exclude={"precision", "backend"})
        if passages.pool == "mean":
            asked |= {"window": passages.tokens or UNLIMITED_TOKENS, "overlap": passages.overlap}
        return asked

    @model_validator(mode="after")
    def _root_apart_from_corpus(self) -> "Config":
        root, corpus = _absolute(self.root), _absolute(self.corpus.uri)
        if any(mark in corpus for mark in "*["):
            corpus = re.split(r"[*\[]", corpus, maxsplit=1)[0].rpartition("/")[0]
        if root == corpus or root.startswith(corpus + "/"):
            raise ValueError(f"root {self.root} lies inside the corpus {self.corpus.uri}, which would then feed on itself")
        return self


def _absolute(uri: str) -> str:
    return uri.rstrip("/") if "://" in uri else str(Path(uri).expanduser().absolute())
