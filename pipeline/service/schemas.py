"""What requests and answers look like; FastAPI makes the OpenAPI document of it.

Strict: a number is not a text, an unknown field is an error. Limits that the config sets are checked by the engine.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.search.filters import Filter
from pipeline.search.searcher import Mode

Include = Literal["text", "span", "metadata", "source"]
Finite = Annotated[float, Field(allow_inf_nan=False)]
ALL: tuple[Include, ...] = ("text", "span", "metadata", "source")


class Request(BaseModel):
    """A request's body."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class SearchRequest(Request):
    """Texts, or vectors of the model that the index was made with."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"queries": "how central banks fight inflation", "k": 3},
                {"queries": "inflation", "mode": "hybrid", "filter": {"type": "gte", "key": "year", "value": 2020}},
            ]
        }
    )
    queries: str | list[str] | None = Field(None, description="One text or several")
    vectors: list[list[Finite]] | None = Field(None, description="Unit vectors instead; others are normalised")
    k: int | None = Field(None, ge=1, description="Texts per query; default: search.k of the config")
    recall: float | None = Field(None, ge=0, le=1, description="The fastest measured settings that find so much")
    latency_ms: float | None = Field(None, gt=0, description="The best measured settings within a time per query")
    mode: Mode | None = Field(None, description="By vectors, by words (BM25), or both; default: search.mode of the config")
    rerank: bool = Field(False, description="Re-rank the best texts with the model of search.reranker")
    filter: Filter | None = Field(None, description="Only documents whose metadata passes, as in OpenAI's vector stores")
    group: Literal["document", "passage"] = Field(
        "document", description="A document once, by its best passage, or with every passage found"
    )
    include: list[Include] = Field(list(ALL), description="What each hit shows beside rank, scores and document ids")

    @model_validator(mode="after")
    def _one_of_both(self) -> "SearchRequest":
        if (self.queries is None) == (self.vectors is None):
            raise ValueError("give queries or vectors, one of both")
        return self

    @property
    def texts(self) -> list[str] | None:
        """The queries as a list."""
        return [self.queries] if isinstance(self.queries, str) else self.queries


class Source(BaseModel):
    """Where a document was read."""

    uri: str
    row: int


class DocumentOfHit(BaseModel):
    """A document that has the text of a hit. ``span``: where in the document, in characters; the end is exclusive."""

    id: str
    passage: int
    span: tuple[int, int] | None = None
    metadata: Any = None
    source: Source | None = None


class HitOut(BaseModel):
    """A text that answers the query. ``score``: what it is ranked by, one of ``scores``.

    ``scores``: dense is the cosine, lexical BM25, hybrid the fused one, rerank the re-ranker's; of rankings that have it.

    ``doc_ids``: every document that has this text and is not above it already; ``documents`` says more of the first 1,000.
    """

    rank: int
    score: float
    scores: dict[str, float]
    doc_ids: list[str]
    text: str | None = None
    documents: list[DocumentOfHit]


class Result(BaseModel):
    """The answer to one query, best first. ``truncated``: the model has read only the beginning of the query."""

    hits: list[HitOut]
    truncated: bool = False


class SearchResponse(BaseModel):
    """Answers in the order of the queries, all from one artifact. ``took_ms``: queue, encode, search, rerank, total."""

    artifact: str
    model: str
    took_ms: dict[str, float]
    results: list[Result]


class EmbeddingsRequest(Request):
    """OpenAI's request. Texts are encoded as queries, with the model's query prompt."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"model": "all-MiniLM-L6-v2", "input": "a text"}]})
    model: str = Field(description="The model of GET /v1/models; vectors of another one would mean nothing here")
    input: str | list[str] | list[int] | list[list[int]] = Field(
        description="One text or several; token ids are refused, they are of the client's tokenizer"
    )
    encoding_format: Literal["float", "base64"] = Field("float", description="base64: little-endian float32")
    dimensions: int | None = Field(None, ge=1, description="Only the model's own number")
    user: str | None = Field(None, description="Ignored")


class Embedding(BaseModel):
    """One vector."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens read, special ones included."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    """OpenAI's answer."""

    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: Usage


class RankingOptions(Request):
    """OpenAI's options. ``ranker``: none, or whatever else for the re-ranker where the config has one."""

    ranker: Literal["none", "auto", "default-2024-11-15"] = "auto"
    score_threshold: Finite | None = Field(None, description="Only what scores so much or more")


class VectorStoreSearchRequest(Request):
    """OpenAI's request. Searched as search.mode of the config says."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"query": "a text", "max_num_results": 3}]})
    query: str | list[str] = Field(description="One text, or several ways to put it: a document counts by the best")
    filters: Filter | None = Field(None, description="Only documents whose metadata passes")
    max_num_results: int = Field(10, ge=1, le=50, description="Documents")
    ranking_options: RankingOptions = Field(RankingOptions(), description="Re-ranking and the least score")
    rewrite_query: bool = Field(False, description="Ignored: queries are searched for as they are")


class Content(BaseModel):
    """The passage that answers."""

    type: Literal["text"] = "text"
    text: str


class VectorStoreResult(BaseModel):
    """A document by its best passage. ``file_id``: its id, ``filename``: the file it was read from."""

    file_id: str
    filename: str
    score: float
    attributes: dict[str, Any]
    content: list[Content]


class VectorStoreSearchResponse(BaseModel):
    """OpenAI's answer, always one page."""

    object: Literal["vector_store.search_results.page"] = "vector_store.search_results.page"
    search_query: list[str]
    data: list[VectorStoreResult]
    has_more: bool = False
    next_page: None = None


class Model(BaseModel):
    """A model by OpenAI's fields; ``created``: when the artifact was made."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "vecmill"


class Models(BaseModel):
    """OpenAI's list of models: the one that is here."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorBody(BaseModel):
    """Why there is no answer. ``param``: the field that is wrong."""

    message: str
    type: str
    param: str | None
    code: str


class Error(BaseModel):
    """OpenAI's error envelope."""

    error: ErrorBody


class Ready(BaseModel):
    """``degraded``: what is live cannot be served, an earlier artifact answers; GET /info says why."""

    ready: bool
    degraded: bool
    artifact: str


class Info(BaseModel):
    """What is served, how good it is, and what a request may ask for. ``mode``: of a text search that names none."""

    artifact: str
    commit: int | None
    created: str
    model: str
    dim: int
    max_tokens: int
    passages: int
    documents: int
    modes: list[Mode]
    mode: Mode
    rerank: bool
    columns: list[str]
    recall: float
    recall_k: int
    points: list[dict[str, float]]
    degraded: bool
    reason: str | None
    version: str
    limits: dict[str, float]
