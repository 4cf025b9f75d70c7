"""Metrics: what is exported is what the dashboard and the alert rules ask for."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml

from pipeline import metrics
from pipeline.metrics import LAST_RUN, QUERY_BATCH, ROWS, SEARCH_REQUESTS, SERVICE, WORKERS, Metric
from pipeline.operations.exposition import Meters
from tests.conftest import make_config, sentences, write_jsonl

DOCKER = Path(__file__).parent.parent / "docker"
ADDED = {"le", "instance", "job"}
"""Labels that Prometheus and histograms bring."""
PARTS = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}
EXPORTED = {
    name + part: metric
    for metrics_, prefix in ((SERVICE, ""), (LAST_RUN, ""), (WORKERS, "ray_"))
    for metric in metrics_
    for name in [prefix + metric.name]
    for part in PARTS[metric.kind]
}


def expressions():
    dashboard = json.loads((DOCKER / "grafana.json").read_text())
    found = [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel["targets"]]
    rules = yaml.safe_load((DOCKER / "alerts.yaml").read_text())["groups"][0]["rules"]
    return found + [(rule["alert"], rule["expr"]) for rule in rules]


@pytest.mark.parametrize(("title", "expression"), expressions(), ids=lambda value: value[:30])
def test_dashboard_and_rules_ask_for_what_is_exported(title, expression):
    asked = re.findall(r"\b((?:ray_)?vecmill_\w+)(?:\{([^}]*)\})?", expression)
    assert asked, title
    known = set(ADDED)
    for name, matchers in asked:
        assert name in EXPORTED, f"{title}: nothing exports {name}"
        known |= set(EXPORTED[name].labels)
        assert set(re.findall(r"(\w+)\s*=", matchers)) <= {*EXPORTED[name].labels, *ADDED}, title
    for labels in re.findall(r"by \(([^)]*)\)", expression):
        assert {label.strip() for label in labels.split(",")} <= known, title


def test_every_metric_is_on_the_dashboard():
    asked = {EXPORTED[name] for _, expression in expressions() for name in re.findall(r"\b(?:ray_)?vecmill_\w+", expression)}
    assert asked == {*SERVICE, *LAST_RUN, *WORKERS}


def test_metrics_are_well_named():
    values = [value for value in vars(metrics).values() if isinstance(value, Metric)]
    assert set(values) == {*SERVICE, *LAST_RUN, *WORKERS}
    assert len({metric.name for metric in values}) == len(values)
    for metric in values:
        assert metric.name.startswith("vecmill_")
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(metric.buckets)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_alerts_fire_when_they_should():
    for command in (["check", "rules", "alerts.yaml"], ["test", "rules", "alerts.test.yaml"]):
        done = subprocess.run(["promtool", *command], cwd=DOCKER, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_meters_refuse_what_is_not_theirs():
    meters = Meters((SEARCH_REQUESTS, QUERY_BATCH))
    meters.count(SEARCH_REQUESTS, route="/search", code="200")
    meters.observe(QUERY_BATCH, 3)
    text = meters.text().decode()
    assert 'vecmill_search_requests_total{code="200",route="/search"} 1.0' in text
    assert 'vecmill_query_batch_size_bucket{le="4.0"} 1.0' in text
    with pytest.raises(KeyError):
        meters.count(ROWS, stage="a", status="b")
    with pytest.raises(KeyError):
        meters.observe(SEARCH_REQUESTS, 1)
    with pytest.raises(ValueError, match="label"):
        meters.count(SEARCH_REQUESTS, code="200")


def values_of(text):
    lines = [line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


@pytest.mark.usefixtures("ray_for_programs")
def test_a_run_writes_its_metrics_and_a_failed_one_its_exit_code(tmp_path):
    rows = [*sentences(40), {"id": "bad", "text": None}]
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows)
    file = tmp_path / "metrics" / "vecmill.prom"
    config = tmp_path / "c.yaml"
    config.write_text(f"root: {tmp_path}/root\ncorpus: {{uri: {tmp_path}/corpus}}\n")
    command = [sys.executable, "-m", "jobs", "reindex", "-c", str(config), "--quiet", "--metrics-file", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = values_of(file.read_text())
    assert found["vecmill_run_exit_code"] == 0
    assert found['vecmill_run_rows{status="documents"}'] == found["vecmill_run_encoded"] == found["vecmill_index_ntotal"] == 40
    assert found['vecmill_run_rows{status="rejected"}'] == 1
    assert time.time() - found["vecmill_run_timestamp_seconds"] < 600
    assert 0 < found["vecmill_recall"] <= 1
    done = subprocess.run(
        [*command, "--set", f"evaluation.queries={tmp_path}/none.jsonl"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 2, done.stderr
    found = values_of(file.read_text())
    assert found["vecmill_run_exit_code"] == 2
    assert not {"vecmill_index_ntotal", "vecmill_recall", "vecmill_run_encoded"} & set(found)
    assert [path.name for path in file.parent.iterdir()] == ["vecmill.prom"]


@pytest.mark.usefixtures("no_ray")
def test_ray_exports_what_workers_and_the_driver_count(tmp_path, short_tmp):
    import ray

    from pipeline.run import reindex

    write_jsonl(tmp_path / "corpus" / "a.jsonl", [*sentences(40), {"id": "bad", "text": None}])
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=150 << 20, log_to_driver=False,
        _temp_dir=short_tmp, _metrics_export_port=0, _system_config={"metrics_report_interval_ms": 500},
    )  # fmt: skip
    try:
        reindex(make_config(tmp_path / "root", tmp_path / "corpus"))
        (node,) = ray.nodes()
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        wanted = {
            'ray_vecmill_rows_total{stage="ingest",status="documents"}': 40,
            'ray_vecmill_rows_total{stage="ingest",status="rejected"}': 1,
            'ray_vecmill_rows_total{stage="embed",status="encoded"}': 40,
            'ray_vecmill_publish_total{result="committed"}': 1,
            "ray_vecmill_encode_seconds_count": 1,
            'ray_vecmill_shards_done{stage="embed"}': 40,
            "ray_vecmill_index_ntotal": 40,
        }
        deadline = time.monotonic() + 120
        while (found := exported(httpx.get(url).text, wanted)) != wanted and time.monotonic() < deadline:
            time.sleep(0.5)
        assert found == wanted
        assert {name.partition("{")[0] for name in exported(httpx.get(url).text)} <= set(EXPORTED)
    finally:
        ray.shutdown()


def exported(text, wanted=None):
    """Our metrics, summed over the labels that Ray adds."""
    found = {}
    for name, value in values_of(text).items():
        bare, _, rest = name.partition("{")
        if bare in EXPORTED or bare.startswith("ray_vecmill"):
            metric = EXPORTED.get(bare)
            own = [label for label in re.findall(r'(\w+="[^"]*")', rest) if metric and label.split("=")[0] in metric.labels]
            key = bare + ("{" + ",".join(sorted(own)) + "}" if own else "")
            found[key] = found.get(key, 0) + value
    return found if wanted is None else {key: found[key] for key in wanted if key in found}
