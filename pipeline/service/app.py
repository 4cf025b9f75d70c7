"""The HTTP face of an engine: one FastAPI app, the same under uvicorn and under Ray Serve. CORS is off."""

import base64
import contextlib
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import FastAPI, Query
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp

from pipeline import __version__
from pipeline.operations.exposition import CONTENT_TYPE
from pipeline.service import schemas
from pipeline.service.engine import Engine
from pipeline.service.gate import Gate
from pipeline.service.page import REPORT_HEADERS, page
from pipeline.service.refusals import RefusedError, wrong

REASONS = {
    400: "Not JSON, or a text too long for the model",
    401: "The token is missing or wrong",
    404: "Not here",
    408: "The body came too slowly",
    413: "The body is too long",
    415: "The body is not plain JSON",
    422: "A value that cannot be answered",
    429: "Too much waits; Retry-After says when to come again",
    503: "No answer in time; Retry-After says when to come again",
}
BODY = (400, 408, 413, 415, 422, 429, 503)
JSON = "application/json"
HTML = "text/html"


def make_app(engine: Engine, token: bytes | None = None) -> ASGIApp:
    """The app behind its gate; ``engine`` is closed when the app ends. ``token``: SHA-256 of what clients must show."""

    @contextlib.asynccontextmanager
    async def closing(_: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()

    app = FastAPI(
        title="vecmill",
        version=__version__,
        description="Search in one artifact. Scores are cosines, higher is nearer; every answer comes from one artifact.",
        lifespan=closing,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        responses=_errors(401),
    )
    _add_search(app, engine)
    _add_openai(app, engine)
    _add_state(app, engine)
    _add_page(app, engine)
    app.add_exception_handler(RefusedError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _bug)
    return Gate(app, engine.limits, engine.meters, token)


def _add_search(app: FastAPI, engine: Engine) -> None:
    @app.post("/search", response_model=schemas.SearchResponse, responses=_errors(*BODY))
    async def search(request: schemas.SearchRequest) -> Response:
        """The texts nearest to each query, with every document that has them."""
        return Response(await engine.search(request), media_type=JSON)

    @app.get(
        "/similar/{doc_id:path}",
        response_model=schemas.SearchResponse,
        responses=_errors(404, 422, 429, 503),
    )
    async def similar(
        doc_id: str,
        passage: Annotated[int, Query(ge=0, lt=1 << 31, description="Which passage of the document")] = 0,
        k: Annotated[int | None, Query(ge=1, description="Texts; default: search.k of the config")] = None,
        include: Annotated[tuple[schemas.Include, ...], Query(description="What each hit shows")] = schemas.ALL,
    ) -> Response:
        """The texts nearest to a passage of a document, less that document. Reads the ids of all documents."""
        return Response(await engine.similar(doc_id, passage, k, include), media_type=JSON)


def _add_openai(app: FastAPI, engine: Engine) -> None:
    @app.post(
        "/v1/embeddings",
        response_model=schemas.EmbeddingsResponse,
        responses=_errors(404, *BODY),
    )
    async def embeddings(request: schemas.EmbeddingsRequest) -> Response:
        """Vectors as OpenAI's clients ask for them, of texts as queries."""
        if request.model != engine.model:
            raise RefusedError(404, "model_not_found", f"model: {request.model} is not here, {engine.model} is", "model")
        if request.dimensions not in {None, engine.encoder.dim}:
            raise wrong("dimensions", f"{request.dimensions} cannot be had, the index is made of {engine.encoder.dim}")
        texts = [request.input] if isinstance(request.input, str) else request.input
        found = await engine.embeddings([_text(each) for each in texts])
        vectors = found.vectors.astype("<f4")
        data = [
            schemas.Embedding(
                index=number,
                embedding=vector.tolist() if request.encoding_format == "float" else base64.b64encode(vector).decode(),
            )
            for number, vector in enumerate(vectors)
        ]
        usage = schemas.Usage(prompt_tokens=found.tokens, total_tokens=found.tokens)
        answer = schemas.EmbeddingsResponse(model=engine.model, data=data, usage=usage)
        return Response(answer.model_dump_json(), media_type=JSON)

    @app.post(
        "/v1/vector_stores/{store}/search",
        response_model=schemas.VectorStoreSearchResponse,
        responses=_errors(404, *BODY),
    )
    async def vector_store_search(store: str, request: schemas.VectorStoreSearchRequest) -> Response:
        """Documents as OpenAI's clients search a vector store; its id is live, or the artifact's."""
        return Response(await engine.vector_store_search(store, request), media_type=JSON)

    @app.get("/v1/models")
    async def models() -> schemas.Models:
        """The model that is here."""
        return schemas.Models(data=[schemas.Model(id=engine.model, created=int(engine.current.served.created))])


def _add_state(app: FastAPI, engine: Engine) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, bool]:
        """The process is there."""
        return {"alive": True}

    @app.get("/readyz")
    async def readyz() -> schemas.Ready:
        """Requests are answered, if need be from an earlier artifact."""
        current = engine.current
        return schemas.Ready(ready=True, degraded=current.degraded is not None, artifact=current.served.version)

    @app.get("/info")
    async def info() -> schemas.Info:
        """What is served, how good it is, and the limits of a request."""
        return engine.info()

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Prometheus's text format."""
        return Response(engine.meters.text(), media_type=CONTENT_TYPE)


def _add_page(app: FastAPI, engine: Engine) -> None:
    text, headers = page()

    @app.get("/", include_in_schema=False)
    async def search_page() -> Response:
        """The search page, which holds no data."""
        return Response(text, headers=headers, media_type=HTML)

    @app.get("/report", response_class=Response, responses=_errors(404) | {200: {"content": {HTML: {}}}})
    def report() -> Response:
        """The report of the artifact that answers, a page that needs nothing else."""
        return Response(engine.report(), headers=REPORT_HEADERS, media_type=HTML)


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Error answers of a route, for the OpenAPI document."""
    return {status: {"model": schemas.Error, "description": REASONS[status]} for status in statuses}


def _text(value: str | int | list[int]) -> str:
    if not isinstance(value, str):
        raise wrong("input", "token ids are of the client's tokenizer and mean another text here; send texts")
    return value


async def _refused(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, RefusedError)  # noqa: S101 - what it is registered for
    return error.response()


async def _invalid(_: HttpRequest, error: Exception) -> Response:
    """What FastAPI and pydantic refuse: 400 for what is no JSON, else 422 with the field; the value itself is not repeated."""
    assert isinstance(error, RequestValidationError)  # noqa: S101
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return RefusedError(400, "invalid_json", f"the body is not JSON: {first['ctx']['error']}").response()
    param = str(first["loc"][1]) if len(first["loc"]) > 1 else None
    return RefusedError(422, "invalid_value", f"{param or 'body'}: {first['msg']}", param).response()


async def _http_error(_: HttpRequest, error: Exception) -> Response:
    """What Starlette refuses: unknown routes and methods, bodies that cannot be parsed."""
    assert isinstance(error, HTTPException)  # noqa: S101
    codes = {400: "invalid_json", 404: "unknown_route", 405: "unknown_method"}
    response = RefusedError(error.status_code, codes.get(error.status_code, "refused"), str(error.detail)).response()
    response.headers.update(error.headers or {})
    return response


async def _bug(_: HttpRequest, error: Exception) -> Response:
    """What nobody foresaw; the gate writes it to the log."""
    return RefusedError(500, "internal", f"a bug of the service, {type(error).__name__}; its log says more").response()
