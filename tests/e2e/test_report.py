"""The report of a real run: its numbers are those of the artifact, and a browser shows them."""

import json
import shutil
from itertools import islice

import pytest

from jobs.demo_corpus import docstrings
from pipeline.ann.drift import MAX_IMBALANCE
from pipeline.artifacts.publish import live_artifact
from pipeline.encoding.numerics import cpu_threads, machine_name
from pipeline.ingest.snapshot import snapshot_of
from pipeline.operations import upkeep
from pipeline.operations.forecast import PLAN, Forecast
from pipeline.operations.planning import make_plan
from pipeline.reports.account import Account
from pipeline.reports.report import HTML, JSON, render, stored_account
from pipeline.root import layout
from pipeline.root.job import plan_job
from pipeline.root.journal import last_runs
from pipeline.root.manifest import load
from pipeline.root.storage import Storage
from pipeline.run import reindex, tune
from tests.conftest import make_config, write_jsonl
from tests.e2e.browser import CHROMIUM, look_at

MAX_BYTES = 300_000
BAD = [{"id": "empty", "text": ""}, {"id": "blank", "text": "  "}, {"id": "<script>alert(1)</script>", "text": None}]


@pytest.fixture(scope="module")
def made(tmp_path_factory, short_tmp):
    """Two runs over real docstrings: the second adds some."""
    import ray

    folder = tmp_path_factory.mktemp("report")
    rows = [{"id": row["id"], "text": row["text"]} for row in islice(docstrings(), 1400)]
    config = make_config(
        folder / "root", folder / "corpus", index={"kind": "ivfpq", "nlist": 16, "m": 32, "nbits": 8},
        passages={"long": "truncate"}, compute={"unit_passages": 400},
    )  # fmt: skip
    if not ray.is_initialized():
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, object_store_memory=150 << 20, log_to_driver=False,
            _temp_dir=short_tmp,
        )  # fmt: skip
    write_jsonl(folder / "corpus" / "a.jsonl", [*rows[:1200], *BAD])
    first = reindex(config)
    write_jsonl(folder / "corpus" / "b.jsonl", rows[1200:])
    said = []
    second = reindex(config, say=said.append)
    return config, first, second, said


@pytest.fixture(scope="module")
def account(made):
    config, _, second, _ = made
    return stored_account(Storage(config.root), second.live)


def test_numbers_are_those_of_manifest_snapshot_and_store(made, account):
    config, first, second, _ = made
    live, storage = second.live, Storage(config.root)
    snapshot = snapshot_of(storage, live)
    counts = account.counts
    assert counts == live.counts
    assert {name: counts[name] for name in ("rows", "documents", "rejected")} == {
        name: snapshot.counts[name] for name in ("rows", "documents", "rejected")
    }
    assert counts["rows"] == counts["documents"] + counts["rejected"]
    assert sum(account.quarantine["rows"].values()) == counts["rejected"] == len(BAD)
    assert account.quarantine["passages"] == {}
    assert (account.input_files, account.input_bytes) == (2, sum(file.size_bytes for file in snapshot.files))
    lengths = account.lengths
    assert sum(lengths.tokens.counts) == snapshot.counts["passages"]
    assert lengths.truncated == snapshot.counts["truncated"] > 0
    assert 0.5 < lengths.covered < 1
    assert lengths.longest == 256
    assert account.evaluation == live.evaluation
    assert sum(account.evaluation.health.sizes.counts) == account.evaluation.health.lists == 16
    assert account.disk["artifact"] == {name: file.size_bytes for name, file in live.files.items()}
    imbalance = account.measures[0]
    assert (imbalance.now, imbalance.then) == (live.evaluation.health.imbalance, live.baseline.health.imbalance)
    assert imbalance.limit == MAX_IMBALANCE * imbalance.then
    assert (account.lineage["parent"], account.lineage["run"]) == (first.live.version, second.run)
    assert account.lineage["encoder"] == live.encoder
    assert account.lineage["versions"] == live.versions
    assert account.lineage["machines"] == [machine_name(2)]


def test_work_is_what_the_records_say(made, account):
    config, _, second, said = made
    job = plan_job(config, on_gpu=False)
    records = job.embedding_records()
    work = {each.stage: each for each in account.work}
    assert list(work) == ["ingest", "embed", "train", "add", "merge", "evaluate"]
    assert work["embed"].amounts["passages"] == account.counts["passages"]
    assert work["embed"].amounts["tokens"] == sum(record.counts["tokens"] for record in records)
    assert work["embed"].phases_s["encode"] == pytest.approx(sum(record.timings_s["encode"] for record in records))
    assert work["embed"].phases_s.keys() == {"read", "tokenize", "waiting", "encode", "write"}
    assert 0 < work["embed"].rates["mfu"] < 1.5
    assert work["ingest"].amounts["rows"] == account.counts["rows"]
    assert work["add"].amounts["vectors"] == account.counts["passages"]
    ended = {event.stage: event.elapsed_s for event in said if event.ended}
    for stage, each in work.items():
        assert each.wall_s == pytest.approx(ended[stage], abs=0.1)
    progress = [event for event in said if event.stage == "embed" and event.is_progress]
    assert progress[-1].counts["passages"] == second.encoded
    assert {event.run for event in said} == {second.run}


def test_plan_stands_beside_outcome(made, account):
    config, first, second, _ = made
    storage = Storage(config.root)
    before, after = (load(Forecast, storage, layout.run(outcome.run, PLAN)) for outcome in (first, second))
    assert (before.encode_s, "no record" in before.rate_source) == (None, True)
    assert (after.to_encode, after.passages) == (second.encoded, account.counts["document_rows"])
    assert after.encode_s > 0
    assert after.rate_source == account.rate_source == f"the last 3 embedding records of {machine_name(2)}"
    expected = {each.name: each for each in account.expected}
    assert expected["passages in the index"].predicted == after.passages
    assert expected["encoding, with its start"].predicted == after.encode_s
    for name in ("embeddings", "index", "artifact"):
        assert expected[name].actual == pytest.approx(expected[name].predicted, rel=0.25)


def test_plan_takes_the_speed_from_records_of_this_machine_type(made):
    config, *_ = made
    job = plan_job(
        config.model_copy(update={"compute": config.compute.model_copy(update={"cpus_per_encoder": 2})}), on_gpu=False
    )
    records = [record for record in job.embedding_records() if record.machine == machine_name(2)]
    plan = make_plan(job, lambda _: pytest.fail("measured although there are records"))
    seconds = sum(record.timings_s["encode"] for record in records)
    assert plan.tokens_per_s == pytest.approx(sum(record.counts["tokens"] for record in records) / seconds)
    assert plan.rate_source == f"the last {len(records)} embedding records of {machine_name(2)}"
    other = job.config.compute.model_copy(update={"cpus_per_encoder": cpu_threads() + 1})
    elsewhere = plan_job(config.model_copy(update={"compute": other}), on_gpu=False)
    assert make_plan(elsewhere, lambda texts: float(len(texts))).rate_source == "passages encoded just now"


def test_runs_are_known_and_gc_keeps_those_of_kept_artifacts(made, tmp_path):
    config, first, second, _ = made
    copy = shutil.copytree(config.root, tmp_path / "root")
    runs = last_runs(Storage(str(copy)), 5)
    assert [(run.run, run.state) for run in runs] == [(second.run, "finished"), (first.run, "finished")]
    assert [stage.stage for stage in runs[0].stages] == [
        "ingest", "embed", "train", "add", "merge", "evaluate", "drift", "publish"
    ]  # fmt: skip
    upkeep.collect(config.model_copy(update={"root": str(copy)}), keep=1, grace_s=-1)
    assert [run.run for run in last_runs(Storage(str(copy)), 5)] == [second.run]
    assert load(Forecast, Storage(str(copy)), layout.run(second.run, PLAN)) is not None


def test_page_is_whole_small_and_quotes_what_is_not_ours(made, account):
    config, _, second, _ = made
    page = Storage(config.root).read(f"{layout.artifact(second.live.version)}/{HTML}")
    assert page == render(account)
    assert len(page) < MAX_BYTES
    text = page.decode()
    for foreign in ("<script", "http:", "https:", "src=", "@import", "url(h"):
        assert foreign not in text.replace('xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    config_with_markup = account.lineage | {"config": {"corpus": {"uri": "<script>alert(1)</script>"}}, "run": "<b>run</b>"}
    quoted = render(account.model_copy(update={"lineage": config_with_markup})).decode()
    assert "<script" not in quoted
    assert "&lt;b&gt;run&lt;/b&gt;" in quoted
    assert account.lineage["config"]["store"].keys() == {"embeddings"}


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1400, False)])
def test_browser_shows_it(made, tmp_path, width, dark):
    config, _, second, _ = made
    page = tmp_path / "report.html"
    page.write_bytes(Storage(config.root).read(f"{layout.artifact(second.live.version)}/{HTML}"))
    found = look_at(page, tmp_path, width=width, dark=dark)
    assert found["errors"] == []
    assert found["width"] <= width
    assert found["cut"] == []
    assert len(found["plots"]) == 3
    assert min(found["plots"]) > 150
    assert found["shapes"] > 30
    assert found["smallest"] >= 10
    ink, paper = (sum(int(part) for part in colour[4:-1].split(", ")) for colour in found["colours"])
    assert abs(ink - paper) > 500
    assert (ink > paper) == dark


@pytest.mark.usefixtures("local_ray")
def test_tune_leaves_the_report_and_report_html_tells_the_new_points(made, tmp_path):
    config, _, second, _ = made
    config = config.model_copy(update={"root": str(shutil.copytree(config.root, tmp_path / "root"))})
    folder = layout.artifact(second.live.version)
    storage = Storage(config.root)
    before = storage.read(f"{folder}/{JSON}")
    tuned = tune(config)
    assert storage.read(f"{folder}/{JSON}") == before
    account = stored_account(storage, live_artifact(storage))
    assert account.evaluation == tuned.evaluation
    assert isinstance(account, Account)
    assert json.loads(before)["counts"] == account.counts
