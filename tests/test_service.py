"""The search service over real HTTP: a real artifact, the real model, uvicorn on a free port."""

import asyncio
import base64
import contextlib
import gzip
import json
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import httpx
import hypothesis
import numpy as np
import pytest
import schemathesis
import uvicorn

from pipeline.artifacts.artifact import MANIFEST, read_manifest
from pipeline.artifacts.live import open_live
from pipeline.artifacts.publish import commit
from pipeline.encoder import load_query_encoder
from pipeline.errors import ConfigError
from pipeline.operations.upkeep import rollback
from pipeline.root import layout
from pipeline.root.log import writing
from pipeline.root.storage import Storage
from pipeline.run import reindex
from pipeline.service.app import make_app
from pipeline.service.engine import Engine
from pipeline.service.gate import digest_of
from pipeline.service.ray import PATIENCE
from tests.conftest import MINILM, _free_ports, eventually, make_config, sentences, start_ray, write_jsonl
from tests.test_reranker import save_model

SAME = "Granite is an igneous rock."
SERVE = {"timeout_s": 5, "poll_s": 0.05, "max_queries": 8, "max_query_chars": 400, "max_k": 100, "max_hits": 200}


def corpus(generation):
    rows = [row | {"text": f"{row['text']} Generation {generation}.", "topic": row["id"][-1]} for row in sentences(60)]
    same = [{"id": f"same/{number}", "text": SAME, "topic": None} for number in range(3)]
    return [*rows, *same, {"id": "rates", "text": "Interest rates rose again in March.", "topic": "money"}]


@pytest.fixture(scope="module")
def config(tmp_path_factory, short_tmp):
    """A root with two artifacts, whose texts name their generation; the second is live."""
    folder = tmp_path_factory.mktemp("service")
    start_ray(short_tmp)
    made = make_config(folder / "root", folder / "corpus", corpus={"metadata": ["topic"]}, index={"lexical": True}, serve=SERVE)
    for generation in ("one", "two"):
        write_jsonl(folder / "corpus" / "a.jsonl", corpus(generation))
        assert reindex(made).committed
    return made


def versions(config):
    """The first artifact and the second."""
    return sorted(path.name for path in (Path(config.root) / "artifacts").iterdir())


@contextlib.contextmanager
def served(config, artifact=None, token=None):
    """An engine behind uvicorn in a thread, and a client."""
    engine = Engine(config, artifact)
    server = uvicorn.Server(uvicorn.Config(make_app(engine, digest_of(token)), port=0, log_level="error", access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            client.engine = engine
            yield client
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def client(config):
    with served(config) as client:
        yield client


def ask(client, **body):
    answer = client.post("/search", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def texts_of(result):
    return [hit["text"] for hit in result["hits"]]


def mappings(config):
    """Index and vector files that this process maps, a line each; documents are opened at the first answer."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if f"{config.root}/artifacts/" in line]
    return [line for line in lines if line.endswith((".faiss", ".f16"))]


def metric(client, line):
    values = [text.rpartition(" ")[2] for text in client.get("/metrics").text.splitlines() if text.startswith(f"{line} ")]
    return float(values[0]) if values else 0.0


def test_search_answers_as_the_command_line_does(client, config):
    opened = open_live(config)
    query = "the harbour and the comet"
    vector = load_query_encoder(opened.spec).encode_queries([query])
    expected = opened.searcher.search(vector, 5)[0]
    answer = ask(client, queries=query, k=5)
    assert answer["artifact"] == opened.manifest.version
    assert answer["model"] == MINILM
    assert set(answer["took_ms"]) == {"queue", "encode", "search", "total"}
    (result,) = answer["results"]
    assert [hit["rank"] for hit in result["hits"]] == [1, 2, 3, 4, 5]
    assert [hit["doc_ids"] for hit in result["hits"]] == [[hit.doc_id] for hit in expected]
    assert [hit["score"] for hit in result["hits"]] == pytest.approx([hit.score for hit in expected], abs=1e-5)
    document = result["hits"][0]["documents"][0]
    assert document["metadata"] == {"topic": expected[0].doc_id[-1]}
    assert document["source"] == {"uri": expected[0].source_uri, "row": expected[0].source_row}
    assert document["span"] == [expected[0].start, expected[0].end]
    by_vector = ask(client, vectors=(3 * vector).tolist(), k=5)
    assert texts_of(by_vector["results"][0]) == texts_of(result)
    assert "encode" not in by_vector["took_ms"]


def test_a_text_comes_with_all_its_documents(client):
    (result,) = ask(client, queries=["igneous rock"], k=2, include=[])["results"]
    first = result["hits"][0]
    assert first["doc_ids"] == ["same/0", "same/1", "same/2"]
    assert set(first) == {"rank", "score", "scores", "doc_ids", "documents"}
    assert [set(document) for document in first["documents"]] == [{"id", "passage"}] * 3
    assert len(result["hits"]) == 2


def test_targets_choose_among_the_measured_settings(client):
    assert ask(client, queries="a comet", recall=0.5)["results"][0]["hits"]
    answer = client.post("/search", json={"queries": "a comet", "latency_ms": 1e-9})
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "latency_ms"


def test_by_words_by_vectors_and_both(client):
    query = "Interest rates in March"
    answers = {mode: ask(client, queries=query, mode=mode, k=64) for mode in ("dense", "lexical", "hybrid")}
    found = {mode: answer["results"][0]["hits"] for mode, answer in answers.items()}
    assert set(answers["lexical"]["took_ms"]) == {"search", "total"}
    for mode, hits in found.items():
        assert hits[0]["doc_ids"] == ["rates"]
        assert all(hit["score"] == hit["scores"][mode] for hit in hits)
        assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
    assert len(found["lexical"]) == 1  # no other text has a word of the query but stop words
    assert len(found["dense"]) == len(found["hybrid"]) == 62
    assert set(found["hybrid"][0]["scores"]) == {"dense", "lexical", "hybrid"}
    assert found["hybrid"][0]["scores"]["hybrid"] == pytest.approx(1 / 61)
    assert found["hybrid"][1]["scores"]["hybrid"] == pytest.approx(0.5 / 62)
    by_dense = {hit["text"]: hit["score"] for hit in found["dense"]}
    assert all(hit["scores"]["dense"] == pytest.approx(by_dense[hit["text"]], abs=1e-6) for hit in found["hybrid"])
    assert ask(client, queries=["zzz qqq", query], mode="lexical")["results"][0]["hits"] == []


@pytest.mark.parametrize("mode", ["dense", "lexical", "hybrid"])
def test_only_what_passes_a_filter_is_found(client, mode):
    query = "Note about the harbour and granite, an igneous rock"
    everything = ask(client, queries=query, mode=mode, k=64)["results"][0]["hits"]
    topics = {document["id"]: document["metadata"]["topic"] for hit in everything for document in hit["documents"]}
    assert len(set(topics.values())) > 5
    for wanted, passes in (
        ({"type": "eq", "key": "topic", "value": "3"}, lambda topic: topic == "3"),
        ({"type": "ne", "key": "topic", "value": "3"}, lambda topic: topic != "3"),
        ({"type": "gte", "key": "topic", "value": "5"}, lambda topic: topic is not None and topic >= "5"),
        ({"type": "eq", "key": "topic", "value": 3}, lambda topic: False),
    ):
        found = ask(client, queries=query, mode=mode, k=64, filter=wanted)["results"][0]["hits"]
        expected = [doc for hit in everything for doc in hit["doc_ids"] if passes(topics[doc])]
        if mode == "hybrid":
            assert sorted(doc for hit in found for doc in hit["doc_ids"]) == sorted(expected)
        else:
            assert [doc for hit in found for doc in hit["doc_ids"]] == expected


def test_the_best_are_ordered_by_a_cross_encoder(config, tmp_path, minilm):
    named = {"reranker": str(save_model(tmp_path / "reranker", minilm[1].path)), "rerank_depth": 5}
    search = config.search.model_copy(update=named)
    with served(config.model_copy(update={"search": search})) as client:
        assert client.get("/info").json()["rerank"] is True
        plain, ordered = (ask(client, queries=["harbour", "granite"], k=6, rerank=rerank) for rerank in (False, True))
        assert set(ordered["took_ms"]) == {"queue", "encode", "search", "rerank", "total"}
        for before, after in zip(plain["results"], ordered["results"], strict=True):
            assert sorted(texts_of(before)[:5]) == sorted(texts_of(after)[:5])
            assert texts_of(before)[5] == texts_of(after)[5]
            scores = [hit["scores"]["rerank"] for hit in after["hits"][:5]]
            assert scores == sorted(scores, reverse=True)
            assert [hit["score"] for hit in after["hits"][:5]] == scores
        answer = client.post("/v1/vector_stores/live/search", json={"query": "harbour", "max_num_results": 5}).json()
        assert [item["content"][0]["text"] for item in answer["data"]] == texts_of(ordered["results"][0])[:5]
        answer = client.post("/search", json={"vectors": [[1.0] * 384], "rerank": True})
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, "rerank")
        many = client.post("/search", json={"queries": ["a"] * 8, "k": 26, "rerank": True})
        assert (many.status_code, many.json()["error"]["param"]) == (422, "k")


def test_every_passage_or_each_document_once(client, config):
    assert ask(client, queries="harbour", group="passage")["results"][0]["hits"]
    longer = ask(client, queries="harbour", group="passage", k=64)["results"][0]["hits"]
    assert len(longer) == 62


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"queries": "a", "mode": "sparse"}, "mode"),
        ({"vectors": [[1.0] * 384], "mode": "lexical"}, "mode"),
        ({"vectors": [[1.0] * 384], "mode": "hybrid"}, "mode"),
        ({"queries": "a", "filter": {"type": "eq", "key": "colour", "value": 1}}, "filter"),
        ({"queries": "a", "filter": {"type": "eq", "key": "topic"}}, "filter"),
        ({"queries": "a", "filter": {"type": "gt", "key": "topic", "value": True}}, "filter"),
        ({"queries": "a", "group": "author"}, "group"),
        ({"queries": "a", "rerank": True}, "rerank"),
    ],
)
def test_what_cannot_be_searched_for_is_refused(client, body, param):
    answer = client.post("/search", json=body)
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["param"] == param


def test_similar_leaves_out_the_document_itself(client):
    answer = client.get("/similar/same/1", params={"k": 3}).json()
    hits = answer["results"][0]["hits"]
    assert hits[0]["doc_ids"] == ["same/0", "same/2"]
    assert hits[0]["score"] == pytest.approx(1, abs=1e-3)
    assert len(hits) == 3
    assert client.get("/similar/nobody").status_code == 404
    assert client.get("/similar/same/1", params={"passage": 1}).json()["error"]["code"] == "document_not_found"
    assert client.get("/similar/same/1", params={"k": 0}).status_code == 422


# cases 61 to 63 of the collection of bad inputs, and what else cannot be answered
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"queries": "a", "k": 0}, "k"),
        ({"queries": "a", "k": -1}, "k"),
        ({"queries": "a", "k": 10**9}, "k"),
        ({"queries": "a", "k": 10**40}, "k"),
        ({"queries": "a", "k": "5"}, "k"),
        ({"queries": ["a"] * 3, "k": 90}, "k"),
        ({"queries": ""}, "queries"),
        ({"queries": " \t\n"}, "queries"),
        ({"queries": ["a", ""]}, "queries"),
        ({"queries": None}, None),
        ({"queries": [None]}, "queries"),
        ({"queries": []}, "queries"),
        ({"queries": ["a"] * 10_000}, "queries"),
        ({"queries": "a" * 401}, "queries"),
        ({"queries": "a\ud800"}, "queries"),
        ({"queries": "a", "\ud800": 1}, None),
        ({"vectors": []}, "vectors"),
        ({"vectors": [[]]}, "vectors"),
        ({"vectors": [[1.0, 2.0]]}, "vectors"),
        ({"vectors": [[0.0] * 384]}, "vectors"),
        ({"queries": "a", "vectors": [[1.0] * 384]}, None),
        ({"queries": "a", "nprobe": 0}, "nprobe"),
        ({"queries": "a", "recall": 1.1}, "recall"),
        ({"queries": "a", "latency_ms": 0}, "latency_ms"),
        ({"queries": "a", "include": ["vectors"]}, "include"),
        ([], None),
        (7, None),
    ],
)
def test_what_cannot_be_answered_is_422_and_names_the_field(client, body, param):
    answer = client.post("/search", content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert "Traceback" not in answer.text


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_vector_that_is_not_finite_is_422(client, value):
    content = '{"vectors": [[' + ", ".join([value] * 384) + "]]}"
    answer = client.post("/search", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "vectors"


def test_more_than_there_is_gives_what_there_is(client, config):
    hits = ask(client, queries="a comet", k=100)["results"][0]["hits"]
    assert len(hits) == 62
    assert all(hit["doc_ids"] for hit in hits)


# case 64
@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"", {}, 422),
        (b"\xff\xfe", {}, 400),
        (b"[" * 100_000, {}, 400),
        (b'{"queries": "a", "k": ' + b"1" * 10_000 + b"}", {}, 400),
        (b'{"queries": "a"}', {"content-type": "text/plain"}, 415),
        (b"queries=a", {"content-type": "application/x-www-form-urlencoded"}, 415),
        (gzip.compress(b'{"queries": "' + b"a" * 10_000_000 + b'"}', mtime=0), {"content-encoding": "gzip"}, 415),
        (b'{"queries": "' + b"a" * 5_000_000 + b'"}', {}, 413),
    ],
)
def test_what_is_no_plain_json_is_refused(client, content, headers, status):
    answer = client.post("/search", content=content, headers={"content-type": "application/json"} | headers)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


def test_a_long_body_without_a_length_is_cut_off(client):
    def chunks():
        for _ in range(40):
            yield b" " * 100_000

    headers = {"content-type": "application/json"}
    with contextlib.suppress(httpx.WriteError, httpx.ReadError):  # the server may hang up while we still send
        assert client.post("/search", content=chunks(), headers=headers).status_code == 413


def test_a_slow_body_is_408(config):
    quick = config.model_copy(update={"serve": config.serve.model_copy(update={"timeout_s": 0.3})})
    with served(quick) as client, socket.create_connection((client.base_url.host, client.base_url.port)) as raw:
        raw.sendall(b"POST /search HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n{")
        raw.settimeout(20)
        assert raw.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_routes_and_ids(client):
    assert client.get("/nothing").json()["error"]["code"] == "unknown_route"
    assert client.get("/search").status_code == 405
    assert client.get("/docs").status_code == 404
    assert client.get("/healthz", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = client.get("/healthz", headers={"x-request-id": "a b\tc"}).headers["x-request-id"]
    assert len(made) == 32
    preflight = client.options("/search", headers={"origin": "http://evil", "access-control-request-method": "POST"})
    assert "access-control-allow-origin" not in preflight.headers


def test_info_tells_the_limits_and_the_artifact(client, config):
    info = client.get("/info").json()
    assert info["limits"] == {
        "max_queries": 8, "max_query_chars": 400, "max_k": 100, "max_hits": 200, "timeout_s": 5.0, "max_body_bytes": 1e6,
    }  # fmt: skip
    assert info["artifact"] == open_live(config).manifest.version
    assert (info["dim"], info["passages"], info["documents"], info["degraded"]) == (384, 62, 64, False)
    assert client.get("/readyz").json() == {"ready": True, "degraded": False, "artifact": info["artifact"]}


def test_a_token_is_asked_for_everywhere_but_by_the_probes(config):
    with served(config, token="s3cret") as client:
        for route in ("/info", "/metrics", "/openapi.json", "/v1/models", "/nothing"):
            assert client.get(route).status_code == 401
        answer = client.post("/search", json={"queries": "a"}, headers={"authorization": "Bearer s3cre"})
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["type"] == "authentication_error"
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
        assert client.get("/info", headers={"authorization": "bearer s3cret"}).status_code == 200


def test_the_openai_client_gets_our_vectors(client, config):
    import openai

    texts = ["a comet over the harbour", "Zinsen"]
    expected = load_query_encoder(open_live(config).spec).encode_queries(texts)
    api = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
    (model,) = api.models.list().data
    for options in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}, {"dimensions": 384}):
        answer = api.embeddings.create(model=model.id, input=texts, **options)
        vectors = answer.data
        if options.get("encoding_format") == "base64":
            found = np.array([np.frombuffer(base64.b64decode(each.embedding), "<f4") for each in vectors])
        else:
            found = np.array([each.embedding for each in vectors], dtype=np.float32)
        assert np.allclose(found, expected, atol=1e-3)
        assert [each.index for each in vectors] == [0, 1]
        assert answer.usage.total_tokens == answer.usage.prompt_tokens > 8
    assert len(api.embeddings.create(model=model.id, input="one").data) == 1
    with pytest.raises(openai.NotFoundError, match=MINILM):
        api.embeddings.create(model="text-embedding-3-small", input="a")
    for wrong in ({"dimensions": 128}, {"input": [1, 2]}, {"input": [[1, 2]]}, {"input": []}):
        with pytest.raises(openai.UnprocessableEntityError):
            api.embeddings.create(**{"model": model.id, "input": "a"} | wrong)
    with pytest.raises(openai.BadRequestError, match="longer than the model's 256 tokens"):
        api.embeddings.create(model=model.id, input="a," * 200)


def test_the_openai_client_searches_the_vector_store(client, config):
    openai = pytest.importorskip("openai")
    version = client.get("/info").json()["artifact"]
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as theirs:
        stores = theirs.vector_stores
        page = stores.search("live", query="interest rates", max_num_results=3)
        assert page.data[0].file_id == "rates"
        assert len(page.data) == 3
        first = page.data[0]
        assert (first.attributes, first.content[0].text) == ({"topic": "money"}, "Interest rates rose again in March.")
        assert first.filename.endswith("a.jsonl")
        hits = ask(client, queries="interest rates", k=3)["results"][0]["hits"]
        assert [item.score for item in page.data] == pytest.approx([hit["score"] for hit in hits], abs=1e-6)
        both = stores.search(version, query=["interest rates", "igneous rock"], max_num_results=4)
        assert {item.file_id for item in both.data} >= {"rates", "same/0", "same/1", "same/2"}
        only = stores.search("live", query="interest rates", filters={"type": "eq", "key": "topic", "value": "3"})
        assert {item.attributes["topic"] for item in only.data} == {"3"}
        high = stores.search("live", query="interest rates", ranking_options={"score_threshold": first.score - 1e-3})
        assert [item.file_id for item in high.data] == ["rates"]
        with pytest.raises(openai.NotFoundError, match="elsewhere is not here, live and"):
            stores.search("elsewhere", query="a")
        for wrong, param in (
            ({"filters": {"type": "eq", "key": "colour", "value": "3"}}, "filters"),
            ({"query": ""}, "query"),
            ({"query": ["a"] * 5, "max_num_results": 50}, "max_num_results"),
        ):
            with pytest.raises(openai.UnprocessableEntityError, match=f" {param}: ") as refused:
                stores.search("live", **{"query": "a"} | wrong)
            assert refused.value.param == param


def test_concurrent_clients_get_their_own_answers(client):
    rows = [row for row in corpus("two") if row["id"].startswith("d")]

    async def one(api, row):
        answer = await api.post("/search", json={"queries": row["text"], "k": 1})
        assert answer.status_code == 200
        assert row["id"] in answer.json()["results"][0]["hits"][0]["doc_ids"]

    async def all_of_them():
        limits = httpx.Limits(max_connections=32)
        async with httpx.AsyncClient(base_url=client.base_url, limits=limits, timeout=60) as api:
            await asyncio.gather(*(one(api, row) for row in rows * 3))

    before = metric(client, "vecmill_query_batch_size_count"), metric(client, "vecmill_query_batch_size_sum")
    asyncio.run(all_of_them())
    batches = metric(client, "vecmill_query_batch_size_count") - before[0]
    assert metric(client, "vecmill_query_batch_size_sum") - before[1] == 180
    assert batches < 180  # some were encoded together


def test_overload_is_429_and_passes(config):
    narrow = config.serve.model_copy(update={"queue": 4, "threads": 1})
    with served(config.model_copy(update={"serve": narrow})) as client:

        async def flood():
            async with httpx.AsyncClient(base_url=client.base_url, timeout=60) as api:
                bodies = [{"queries": [f"query {number} {part}" for part in range(4)]} for number in range(64)]
                return await asyncio.gather(*(api.post("/search", json=body) for body in bodies))

        answers = asyncio.run(flood())
        codes = {answer.status_code for answer in answers}
        assert codes == {200, 429}
        assert all(answer.headers["retry-after"] == "1" for answer in answers if answer.status_code == 429)
        assert ask(client, queries="quiet again")["results"]
        assert metric(client, 'vecmill_search_requests_total{code="429",route="/search"}') > 0
        assert metric(client, 'vecmill_queue_depth{queue="encoder"}') == 0


def test_a_request_that_takes_too_long_is_503(config):
    hasty = config.serve.model_copy(update={"timeout_s": 0.0001})
    with served(config.model_copy(update={"serve": hasty})) as client:
        answer = client.post("/search", json={"queries": ["a comet"] * 8})
        assert answer.status_code in {503, 408}
        assert answer.json()["error"]["message"]


def test_ten_publishes_under_load_fail_no_request_and_mix_no_artifacts(config):
    """Every answer is of one generation, named by its texts, and of the artifact that the answer names."""
    generations = dict(zip(versions(config), ("one", "two"), strict=True))
    failures, seen, done = [], [], threading.Event()
    with served(config) as client:

        def search():
            with httpx.Client(base_url=client.base_url, timeout=60) as api:
                while not done.is_set():
                    answer = api.post("/search", json={"queries": ["a comet", "the anchor", "a violin"], "k": 20})
                    if answer.status_code != 200:
                        failures.append(answer.text)
                        return
                    found = answer.json()
                    texts = [text for result in found["results"] for text in texts_of(result) if "Note" in text]
                    seen.append((found["artifact"], {text.split()[-1] for text in texts}, len(texts)))

        threads = [threading.Thread(target=search) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for number in range(10):
                target = versions(config)[number % 2]
                rollback(config, target)
                eventually(lambda target=target: client.get("/readyz").json()["artifact"] == target)
        finally:
            done.set()
            for thread in threads:
                thread.join()
        assert metric(client, 'vecmill_swaps_total{result="switched"}') == 10
    assert not failures
    assert {artifact for artifact, _, _ in seen} == set(generations)
    for artifact, named, count in seen:
        assert named == {f"{generations[artifact]}."}
        assert count >= 50


def test_swaps_free_the_old_artifact(config):
    """What nobody serves is gone from memory and mapped no more, so memory does not grow from swap to swap."""
    with served(config) as client:
        before = len(mappings(config))
        for number in range(24):
            old = weakref.ref(client.engine.current.served.opened.searcher)
            target = versions(config)[number % 2]
            rollback(config, target)
            eventually(lambda target=target: ask(client, queries="a comet")["artifact"] == target)
            eventually(lambda old=old: old() is None)
        eventually(lambda: len(mappings(config)) <= before)


def test_a_broken_artifact_is_refused_and_the_old_one_goes_on(config):
    first, second = versions(config)
    rollback(config, first)
    with served(config) as client:
        folder = Path(config.root) / layout.artifact(second)
        file = folder / "index.faiss"
        hold = Path(config.root) / "hold.faiss"
        file.rename(hold)
        data = bytearray(hold.read_bytes())
        data[len(data) // 2] ^= 1
        with writing(Storage(config.root), "test", 30) as lease:  # rollback itself would refuse it
            manifest = read_manifest((folder / MANIFEST).read_bytes(), str(folder))
            file.write_bytes(data)
            commit(lease, Storage(config.root), manifest)
        eventually(lambda: client.get("/readyz").json()["degraded"])
        ready = client.get("/readyz")
        assert (ready.status_code, ready.json()["artifact"]) == (200, first)
        info = client.get("/info").json()
        assert info["degraded"]
        assert "index.faiss" in info["reason"]
        assert ask(client, queries="a comet")["artifact"] == first
        assert metric(client, "vecmill_degraded") == 1
        assert metric(client, 'vecmill_swaps_total{result="refused"}') == 1
        with served(config) as another:  # one that starts now
            assert another.get("/readyz").json() == {"ready": True, "degraded": True, "artifact": first}
            assert ask(another, queries="a comet")["artifact"] == first
        rollback(config, first)
        eventually(lambda: not client.get("/readyz").json()["degraded"])
        hold.replace(file)
        rollback(config, second)
        eventually(lambda: client.get("/readyz").json() == {"ready": True, "degraded": False, "artifact": second})


def test_an_artifact_of_another_encoder_is_refused(config):
    other = config.model_copy(update={"encoder": config.encoder.model_copy(update={"max_tokens": 128})})
    with pytest.raises(ConfigError, match="max_tokens"):
        Engine(other)


def test_the_openapi_document_has_examples_and_errors(client):
    document = client.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/search", "/similar/{doc_id}", "/v1/embeddings", "/v1/models", "/healthz", "/readyz", "/info", "/metrics",
        "/report", "/v1/vector_stores/{store}/search",
    }  # fmt: skip
    assert document["components"]["schemas"]["SearchRequest"]["examples"]
    assert {"400", "408", "413", "415", "422", "429", "503"} <= set(document["paths"]["/search"]["post"]["responses"])


def test_any_request_gets_an_answer_of_the_document(client):
    """Requests made up from the OpenAPI document, right and wrong ones: no 500, nothing that the document does not know."""
    schema = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")
    names = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
    wanted = schemathesis.checks.CHECKS.get_by_names(names)
    calm = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck)}
    bounded = hypothesis.settings(max_examples=20, derandomize=True, database=None, **calm)
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 10
    for operation in operations:
        for mode in schemathesis.GenerationMode:

            @bounded
            @hypothesis.given(operation.as_strategy(generation_mode=mode))
            def check(case):
                case.call_and_validate(checks=wanted)

            with contextlib.suppress(hypothesis.errors.Unsatisfiable):
                check()


@pytest.fixture(scope="module")
def config_file(config, tmp_path_factory):
    file = tmp_path_factory.mktemp("cli") / "c.yaml"
    file.write_text(json.dumps({"root": config.root, "corpus": {"uri": config.corpus.uri}, "serve": SERVE}))
    return file


def test_the_command_answers_until_a_signal(config_file):
    (port,) = _free_ports(1)
    command = [sys.executable, "-m", "jobs", "serve", "-c", str(config_file), "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert f"http://127.0.0.1:{port}" in process.stderr.readline()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            eventually(lambda: is_up(client))
            assert ask(client, queries="igneous rock", k=1)["results"][0]["hits"][0]["text"] == SAME
        process.terminate()
        assert process.wait(60) == 143
    finally:
        process.kill()


def test_other_addresses_need_a_token(config_file):
    command = [sys.executable, "-m", "jobs", "serve", "-c", str(config_file), "--host", "0.0.0.0"]
    environment = {name: value for name, value in os.environ.items() if name != "VECMILL_TOKEN"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--no-auth" in done.stderr


def test_partitions_are_deployments_of_ray_serve(config_file):
    command = [sys.executable, "-m", "jobs", "serve", "-c", str(config_file), "--partitions", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "add --ray" in done.stderr
    done = subprocess.run([*command, "--ray"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "set index.partitions: 2" in done.stderr


def is_up(client):
    with contextlib.suppress(httpx.TransportError):
        return client.get("/healthz").status_code == 200
    return False


@pytest.mark.usefixtures("no_ray")
def test_ray_serve_runs_the_same_app(config_file, short_tmp, monkeypatch):
    from ray import serve

    from pipeline.service.ray import build

    monkeypatch.setenv(*PATIENCE)
    start_ray(short_tmp)
    (port,) = _free_ports(1)
    with pytest.raises(ConfigError, match="unknown argument"):
        build({"confg": str(config_file)})
    with pytest.raises(ConfigError, match=r"set \$VECMILL_TOKEN"):
        build({"config": str(config_file)})
    args = {"config": str(config_file), "overrides": ["serve.max_k=7"], "no_auth": True}
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(args), name="vecmill")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            eventually(lambda: is_up(client))
            assert ask(client, queries="igneous rock", k=1)["results"][0]["hits"][0]["text"] == SAME
            assert client.get("/info").json()["limits"]["max_k"] == 7
            assert client.post("/search", json={"queries": "a", "k": 8}).json()["error"]["param"] == "k"
    finally:
        serve.shutdown()
