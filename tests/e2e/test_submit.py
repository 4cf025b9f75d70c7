"""Jobs of a Ray cluster that wants a token: submitted once per tick, their ends told apart."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobSubmissionClient

from pipeline.artifacts.live import open_live
from pipeline.root import layout
from pipeline.root.log import LogEntry
from pipeline.root.manifest import to_bytes
from pipeline.root.storage import Storage
from tests.conftest import _free_ports, make_config, sentences, write_jsonl

pytestmark = pytest.mark.timeout(300)
HOME = Path(__file__).parent.parent.parent
TOKEN = "the-token-of-this-test-cluster"
AUTH = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
TICK = "2026-11-24T03:00+01:00"


@dataclass(frozen=True)
class TestCluster:
    __test__ = False
    address: str
    folder: Path

    @property
    def client(self) -> JobSubmissionClient:
        return JobSubmissionClient(self.address, headers={"Authorization": f"Bearer {TOKEN}"})

    def environment(self, **auth: str) -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name not in AUTH} | auth

    def command(self, file: Path, *options: Any) -> list[str]:
        command = [sys.executable, "-m", "jobs", "submit", "-c", file, "--address", self.address, "--tick", TICK, *options]
        return [str(part) for part in command]

    def submit(self, file: Path, *options: Any, **auth: str) -> subprocess.CompletedProcess[str]:
        environment = self.environment(**(auth or {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}))
        command = self.command(file, *options)
        return subprocess.run(command, cwd=HOME, env=environment, capture_output=True, text=True, timeout=200)

    def start(self, file: Path, *options: Any) -> subprocess.Popen[str]:
        environment = self.environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
        return subprocess.Popen(self.command(file, *options), cwd=HOME, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def cluster(short_tmp):
    """A head of two CPUs on ports of its own."""
    gcs, dashboard, agent, client, metrics = _free_ports(5)
    folder = Path(short_tmp) / "token"
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats", f"--port={gcs}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}", "--min-worker-port=0", "--max-worker-port=0",
        "--num-cpus=2", "--num-gpus=0", f"--object-store-memory={150 << 20}", f"--temp-dir={folder}",
        "--node-ip-address=127.0.0.1",
    ]  # fmt: skip
    found = TestCluster(f"http://127.0.0.1:{dashboard}", folder)
    environment = found.environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    head = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until(lambda: _answers(found))
        yield found
    finally:
        head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(3)
        kill_all_with(str(folder))


def kill_all_with(part):
    """End the processes that have this in their command line, except this one."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if part in (folder / "cmdline").read_text(errors="replace") and int(folder.name) != os.getpid():
                os.kill(int(folder.name), signal.SIGKILL)


def _wait_until(true, seconds=240):
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline
        time.sleep(0.3)
    return value


def _answers(cluster):
    with contextlib.suppress(ConnectionError, RuntimeError, OSError):
        return bool(cluster.client.get_version())
    return False


def config_file(folder, **sections):
    """A config over a corpus of forty notes, both in this folder."""
    write_jsonl(folder / "corpus" / "a.jsonl", sentences(40))
    sections = {"root": f"{folder}/root", "corpus": {"uri": f"{folder}/corpus"}, "index": {"kind": "flat"}} | sections
    file = folder / "c.yaml"
    file.write_text(json.dumps(sections))
    return file


@contextlib.contextmanager
def held_root(folder):
    """A root whose holder shows no sign of life: a run watches it for the TTL, or until the block ends."""
    storage = Storage(f"{folder}/root")
    entry = {"epoch": 0, "holder": "test", "run": "test", "at": "2026-11-24T00:00:00+00:00"}
    storage.create(layout.log_entry(0), to_bytes(LogEntry(number=0, kind="acquire", **entry)))
    try:
        yield
    finally:
        storage.create(layout.log_entry(1), to_bytes(LogEntry(number=1, kind="release", **entry)))


def watching(cluster, run):
    """Whether the job of a run waits for its root."""
    with contextlib.suppress(RuntimeError):
        return "watching" in cluster.client.get_job_logs(run)
    return False


def only_run(cluster, known):
    """The job that was not there before."""
    return next((job.submission_id for job in cluster.client.list_jobs() if job.submission_id not in known), None)


def known_jobs(cluster):
    return {job.submission_id for job in cluster.client.list_jobs()}


def test_a_tick_is_run_once_on_s3_and_the_keys_show_in_no_other_place(tmp_path, cluster, s3):
    key, secret = s3.key, s3.secret
    root = f"s3://test/{tmp_path.name}/root"
    file = config_file(tmp_path, root=root, store=s3.store)
    done = cluster.submit(file, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert (result["exit_code"], result["committed"], result["counts"]["encoded"]) == (0, True, 40)
    assert "publish: artifact" in done.stderr
    assert open_live(make_config(root, tmp_path, store=s3.store)).manifest.version == result["artifact"]

    job = cluster.client.get_job_info(result["run"])
    assert job.runtime_env.pop("env_vars") == {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}
    assert set(job.runtime_env) == {"working_dir"}
    assert job.entrypoint == f"python -m jobs reindex -c config.yaml --run {result['run']}"
    assert not job.metadata or secret not in job.metadata.values()
    (packed,) = cluster.folder.glob("session_2*/runtime_resources/working_dir_files/*/config.yaml")
    assert (packed.parent / "pipeline" / "run.py").exists()
    assert key not in packed.read_text() and secret not in packed.read_text()

    assert not {"dashboard_sdk.py", "packaging.py", " sdk.py"} & set(re.findall(r" ?\w+\.py", done.stderr))
    again = cluster.submit(file, "--json")
    assert (again.returncode, json.loads(again.stdout)) == (0, result)
    assert f"done already: run {result['run']}" in again.stderr


def test_a_failed_tick_has_the_code_of_its_run_and_is_tried_again(tmp_path, cluster):
    file = config_file(tmp_path)
    write_jsonl(tmp_path / "corpus" / "b.jsonl", [{"id": f"x{number}", "text": ""} for number in range(30)])
    failed = cluster.submit(file)
    assert failed.returncode == 3, failed.stderr[-3000:]
    assert "-1 ended with exit code 3: " in failed.stderr
    (tmp_path / "corpus" / "b.jsonl").unlink()
    mended = cluster.submit(file, "--json", "-q")
    assert mended.returncode == 0, mended.stderr[-3000:]
    assert json.loads(mended.stdout)["run"].endswith("-2")


def test_a_scheduled_job_with_the_vecmill_of_the_nodes_has_the_exit_4_of_a_held_root(tmp_path, cluster):
    file = config_file(tmp_path, compute={"lease_ttl_s": 1.0})
    command = [sys.executable, "-m", "jobs", "schedule", "-c", str(file), "--cron", "0 3 * * *", "--once", "--json"]
    command += ["--address", cluster.address, "--image"]
    environment = cluster.environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    with held_root(tmp_path):
        scheduler = subprocess.Popen(command, cwd=HOME, env=environment, stderr=subprocess.PIPE, text=True)
        sequence = 0
        while scheduler.poll() is None:
            Storage(f"{tmp_path}/root").put(layout.beat(0, sequence), b"alive")
            sequence += 1
            time.sleep(0.1)
    told = scheduler.stderr.read()
    assert (scheduler.returncode, "another run is writing: test, run test" in told) == (4, True), told
    lines = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    assert [(line["event"], line.get("exit_code")) for line in lines] == [("started", None), ("ended", 4)]


def test_a_job_outlives_its_submitter_and_a_killed_one_is_tried_again(tmp_path, cluster):
    file = config_file(tmp_path, compute={"lease_ttl_s": 200.0})
    known = known_jobs(cluster)
    with held_root(tmp_path):
        stopped = cluster.start(file)
        first = _wait_until(lambda: only_run(cluster, known))
        _wait_until(lambda: watching(cluster, first))
        stopped.send_signal(signal.SIGTERM)
        assert (stopped.wait(60), f"job {first} goes on" in stopped.stderr.read()) == (143, True)
        refused = cluster.submit(file)
        assert (refused.returncode, f"job {first} of this tick is RUNNING" in refused.stderr) == (4, True)

        kill_all_with(f"--run\0{first}")
        _wait_until(lambda: cluster.client.get_job_status(first).value == "FAILED")
        looking_on, second = cluster.start(file), f"{first[:-1]}2"
        _wait_until(lambda: watching(cluster, second))
        kill_all_with(f"--run\0{second}")
        assert (looking_on.wait(100), f"job {second} left no result" in looking_on.stderr.read()) == (1, True)

        killed, third = cluster.start(file), f"{first[:-1]}3"
        _wait_until(lambda: watching(cluster, third))
        killed.kill()
        killed.wait()
    _wait_until(lambda: cluster.client.get_job_status(third).is_terminal())
    assert cluster.client.get_job_status(third).value == "SUCCEEDED"
    done = cluster.submit(file)
    assert (done.returncode, f"done already: run {third}" in done.stderr) == (0, True)


@pytest.mark.parametrize(
    "auth",
    [{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "another"}, {"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_MODE": "disabled"}],
)
def test_a_wrong_or_missing_token_is_one_line_and_exit_2(tmp_path, cluster, auth):
    done = cluster.submit(config_file(tmp_path), **auth, HOME=str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_no_cluster_and_no_time_are_exit_2(tmp_path):
    file = config_file(tmp_path)
    nobody = TestCluster("http://127.0.0.1:9", tmp_path)
    done = nobody.submit(file)
    assert (done.returncode, "no cluster answers" in done.stderr) == (1, True), done.stderr
    done = nobody.submit(file, "--tick", "tonight")
    assert (done.returncode, "--tick tonight: expected ISO 8601" in done.stderr) == (2, True)
