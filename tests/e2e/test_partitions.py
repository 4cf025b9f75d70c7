"""An artifact in two partitions on two nodes of Ray Serve: it answers as in one process, through deaths and new artifacts."""

import asyncio
import contextlib
import json
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import httpx
import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster

from pipeline.errors import ConfigError
from pipeline.operations.upkeep import rollback
from pipeline.run import reindex
from pipeline.service.engine import Engine
from pipeline.service.ray import PATIENCE, build
from pipeline.service.refusals import RefusedError
from pipeline.service.router import ATTEMPTS, RemotePartition
from pipeline.service.schemas import SearchRequest
from tests import conftest
from tests.conftest import _free_ports, make_config, sentences, write_jsonl
from tests.faults.alone import alone as alone  # a fixture

SERVE = {"timeout_s": 30, "poll_s": 0.2}
SAME = "Granite is an igneous rock."
QUESTIONS = [
    {"queries": ["the harbour and the comet", "a violin", "rates"], "k": 7, "mode": mode, **more}
    for mode in ("dense", "lexical", "hybrid")
    for more in (
        {},
        {"group": "passage", "k": 100},
        {"filter": {"type": "eq", "key": "topic", "value": "3"}},
        {"filter": {"type": "ne", "key": "topic", "value": "3"}, "include": ["metadata"]},
    )
]


@pytest.fixture
def config(tmp_path, alone):
    """A root with two artifacts of two index files, whose texts name their generation; the second is live."""
    index = {"kind": "flat", "partitions": 2, "lexical": True}
    made = make_config(tmp_path / "root", tmp_path / "corpus", corpus={"metadata": ["topic"]}, index=index, serve=SERVE)
    for generation in ("one", "two"):
        rows = [row | {"text": f"{row['text']} Generation {generation}.", "topic": row["id"][-1]} for row in sentences(80)]
        same = [{"id": f"same/{number}", "text": SAME, "topic": "3"} for number in range(3)]
        write_jsonl(tmp_path / "corpus" / "a.jsonl", [*rows, *same])
        assert reindex(made).committed
    return made


@pytest.fixture
def config_file(config, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps({"root": config.root, "corpus": {"uri": config.corpus.uri}, "serve": SERVE}))
    return str(file)


@pytest.fixture(scope="module")
def two_nodes():
    """A head and a second node with Serve; the port of its HTTP proxy."""
    ray.shutdown()
    (port,) = _free_ports(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*PATIENCE)
        head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 100 << 20}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        yield port
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


@contextlib.contextmanager
def served(config_file, port):
    args = {"config": config_file, "replicas": 2, "partitions": 2, "cpus": 0.1, "memory": 1 << 20, "no_auth": True}
    serve.run(build(args), name="vecmill")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        eventually(lambda: is_up(client))
        yield client


def is_up(client):
    with contextlib.suppress(httpx.TransportError):
        return client.get("/healthz").status_code == 200
    return False


eventually = partial(conftest.eventually, seconds=60)


def replicas(name):
    """Process and node of each living replica of a deployment of this test's cluster."""
    found = ray._private.state.actors(actor_state_name="ALIVE").values()
    return {each["Pid"]: each["Address"]["NodeID"] for each in found if f"#{name}#" in each["Name"]}


def answer_of(client, body):
    answer = client.post("/search", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


class Load:
    """Three clients that search without a break; every answer is of one generation, that of the artifact it names."""

    def __init__(self, base_url, generations):
        self.failures, self.seen = [], []
        self._url, self._generations = base_url, generations
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._search) for _ in range(3)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        for thread in self._threads:
            thread.join()

    def _search(self):
        body = {"queries": ["a comet", "the anchor", "a violin"], "k": 30, "mode": "hybrid", "group": "passage"}
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._done.is_set():
                answer = client.post("/search", json=body)
                if answer.status_code != 200:
                    self.failures.append(answer.text)
                    continue
                found = answer.json()
                texts = [hit["text"] for result in found["results"] for hit in result["hits"] if "Note" in hit["text"]]
                named = {text.split()[-1] for text in texts}
                if len(texts) < 80 or named != {f"{self._generations[found['artifact']]}."}:
                    self.failures.append(f"{found['artifact']}: {len(texts)} texts of {named}")
                self.seen.append(found["artifact"])

    def more(self, count=20):
        """So many answers from now on."""
        goal = len(self.seen) + count
        eventually(lambda: len(self.seen) >= goal or self.failures)
        assert not self.failures, self.failures[:3]


def mortal(notes):
    """A partition whose replicas note every question, and die of it until there are as many notes as the question says."""

    class Mortal:
        async def answer(self, version, question, deaths, _):
            (notes / str(time.time_ns())).touch()
            if len(list(notes.iterdir())) <= deaths:
                os._exit(1)
            return version, question

    return serve.deployment(Mortal, name="partition-0", num_replicas=4, ray_actor_options={"num_cpus": 0.1}).bind()


@pytest.mark.timeout(240)
@pytest.mark.usefixtures("two_nodes")
def test_a_question_that_replicas_die_of_is_put_to_others(tmp_path):
    partition = RemotePartition(serve.run(mortal(tmp_path), name="mortal", route_prefix=None), "v1", range(3), timeout_s=60)
    assert partition.vector_of(1, 0) == ("v1", "vector_of")
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(RefusedError, match="does not answer") as refused:
        partition.vector_of(1000, 0)
    assert refused.value.status == 503
    # a question that reaches a replica already dead is put to the next by Serve itself, and is no attempt of ours
    assert ATTEMPTS <= len(list(tmp_path.iterdir())) - 2 <= 2 * ATTEMPTS
    serve.delete("mortal")


@pytest.mark.timeout(420)
def test_two_partitions_on_two_nodes_answer_as_one_process(config, config_file, two_nodes):
    generations = dict(
        zip(sorted(path.name for path in (Path(config.root) / "artifacts").iterdir()), ("one", "two"), strict=True)
    )
    engine = Engine(config)
    expected = [json.loads(asyncio.run(engine.search(SearchRequest.model_validate(body)))) for body in QUESTIONS]
    similar = json.loads(asyncio.run(engine.similar("same/1", 0, 5, ["text"])))
    report = engine.report()
    engine.close()
    with pytest.raises(ConfigError, match="2 index files cannot be served in 3 partitions"):
        build({"config": config_file, "partitions": 3, "no_auth": True})
    with served(config_file, two_nodes) as client:
        held = [replicas(f"partition-{number}") for number in range(2)]
        assert [len(set(nodes.values())) for nodes in held] == [2, 2]

        for body, one in zip(QUESTIONS, expected, strict=True):
            found = answer_of(client, body)
            assert found["artifact"] == one["artifact"]
            assert found["results"] == one["results"]
        found = client.get("/similar/same/1", params={"k": 5, "include": "text"}).json()
        assert found["results"] == similar["results"]
        assert client.get("/report").content == report
        assert client.get("/similar/nobody").status_code == 404
        wrong = client.post("/search", json={"queries": "a", "filter": {"type": "eq", "key": "colour", "value": 1}})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (422, "filter")

        with Load(client.base_url, generations) as load:
            load.more()
            for victim in [next(iter(nodes)) for nodes in held]:
                os.kill(victim, signal.SIGKILL)
                load.more(60)
            back = 180  # seconds: Serve starts processes beside three clients that take all there is of two cores
            eventually(lambda: all(len(replicas(f"partition-{number}")) == 2 for number in range(2)), seconds=back)
            first, _ = generations
            rollback(config, first)
            eventually(lambda: load.failures or set(load.seen[-10:]) == {first})
            load.more()
            assert set(load.seen[-20:]) == {first}
