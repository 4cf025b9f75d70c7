"""A cluster that is not here, by arithmetic."""

from dataclasses import replace

import pytest

from pipeline.errors import ConfigError
from pipeline.operations import what_if as module
from pipeline.operations.forecast import Rate
from pipeline.operations.planning import make_plan
from pipeline.operations.what_if import (
    CARDS,
    UTILISATION,
    estimate,
    flops_per_token,
    parse_cluster,
    tokenizer_rate,
    utilisation,
    what_if,
)
from pipeline.root.job import plan_job
from pipeline.root.manifest import Record, to_bytes
from tests.conftest import make_config, sentences, write_jsonl
from tests.gpu.random_models import SHAPES


@pytest.fixture
def job(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", sentences(200))
    return plan_job(make_config(tmp_path / "root", tmp_path / "a.jsonl"), on_gpu=False)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("8xL4", {"L4": 8}),
        ("16xcpu", {"cpu": 16}),
        ("1xa100-80gb, 2xL4,3XA100", {"A100": 4, "L4": 2}),
        ("10xA10,1xA10G", {"A10": 10, "A10G": 1}),
    ],
)
def test_clusters_are_counts_and_names(text, found):
    assert parse_cluster(text) == found


@pytest.mark.parametrize("text", ["", "L4", "8L4", "0xL4", "-1xL4", "8xL4,", "8 x L4", "1.5xL4", "8xB300", "8xL4-big"])
def test_what_is_no_cluster_is_told_the_known_names(text):
    with pytest.raises(ConfigError, match=r"expected COUNTxNAME.*T4, A10G, L4, .*H200, cpu"):
        parse_cluster(text)


def test_gpus_and_cpus_do_not_encode_in_one_run():
    with pytest.raises(ConfigError, match="plan them apart"):
        parse_cluster("8xL4,4xcpu")


def test_utilisation_is_that_of_the_published_benchmark():
    shape, tokens, texts = SHAPES["bge-large"], 115_000, 256
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    flops = layers * (2 * (4 * width**2 + 2 * width * shape["intermediate_size"]) + 4 * width * tokens / texts)
    assert tuple(round(10 * tokens * flops / seconds / (CARDS["L4"] * 1e12), 2) for seconds in (59.107, 18.491)) == UTILISATION


def test_a_narrow_model_may_reach_less():
    assert utilisation(1024) == utilisation(4096) == UTILISATION
    assert utilisation(256) == (UTILISATION[0] / 4, UTILISATION[1])


def test_encoders_of_all_kinds_are_added_up():
    speeds = {"L4": (600_000.0, 2e6), "A100": (1.5e6, 5_150_000.0)}
    found = estimate({"L4": 2, "A100": 1}, speeds, "what", tokens=1e10, tokenizer=Rate(100_000.0, "a sample"))
    assert found.tokens_per_s == (2.7e6, 9.2e6)  # 9.15
    assert found.encode_s == (1100, 3700)
    assert found.tokenizer_cores == {"L4": (6.0, 20.0), "A100": (15.0, 52.0)}  # 51.5
    assert found.encoders == {"L4": 2, "A100": 1}
    assert (found.estimated_from, found.tokenizer_rate_source) == ("what", "100,000 tokens/s of a core here, by a sample")


def test_attention_grows_with_the_length(minilm):
    assert flops_per_token(minilm[1], 100) - flops_per_token(minilm[1], 0) == 6 * 4 * 100 * 384


def test_a_plan_on_cards_follows_from_their_peaks(job, minilm):
    plan = make_plan(job, lambda texts: 1000.0)
    found = what_if({"L4": 2}, plan, job)
    flops = flops_per_token(minilm[1], plan.tokens / plan.passages)
    low, high = (2 * share * 121e12 / flops for share in (0.0375, 0.33))
    assert found.tokens_per_s == (pytest.approx(low, rel=0.05), pytest.approx(high, rel=0.05))
    assert found.encode_s == (pytest.approx(plan.tokens / high, rel=0.05), pytest.approx(plan.tokens / low, rel=0.05))
    assert found.estimated_from.startswith("4% to 33% of the dense FP16 peak that the vendor states (L4 121 TFLOP/s), at 21.")


def test_a_plan_on_cpus_has_encoders_as_here(job):
    plan = make_plan(job, lambda texts: 1000.0)
    found = what_if({"cpu": 4}, plan, job)
    assert found.tokens_per_s == (2000, 4000)
    assert found.encode_s == (pytest.approx(plan.tokens / 4000, rel=0.05), pytest.approx(plan.tokens / 2000, rel=0.05))
    assert found.estimated_from == f"50% to 100% of 1,000 tokens/s of an encoder here, by {plan.rate_source}"
    assert found.tokenizer_cores.keys() == {"cpu"}


def test_tokenizer_is_measured_until_records_tell(job):
    measured = tokenizer_rate(job)
    assert measured.source == "200 passages tokenized just now"
    assert measured.tokens_per_s > 0
    record = Record(unit="a", files=(), counts={"tokens": 20_000}, timings_s={"tokenize": 2.0, "encode": 9.0}, machine="m")
    job.embeddings.put(f"{job.embedding_folder}/a.json", to_bytes(record))
    assert tokenizer_rate(job).tokens_per_s == 10_000


@pytest.mark.parametrize(
    ("encoders", "settings", "facts", "message"),
    [
        ({"L4": 1}, {"precision": "fp32"}, {}, "no figure for L4 in fp32"),
        ({"L4": 1}, {"precision": "int8"}, {}, "int8 is for CPU encoders"),
        ({"T4": 1}, {}, {"overflows": True}, "no figure for T4 in bf16"),
        ({"L4": 1}, {}, {"is_static": True}, "give cpu"),
    ],
)
def test_what_has_no_figure_is_refused(tmp_path, encoders, settings, facts, message):
    write_jsonl(tmp_path / "a.jsonl", sentences(20))
    job = plan_job(make_config(tmp_path / "root", tmp_path / "a.jsonl", encoder=settings), on_gpu=False)
    plan = make_plan(job, lambda texts: 1000.0)
    with pytest.raises(ConfigError, match=message):
        what_if(encoders, plan, replace(job, model=replace(job.model, **facts)))


def test_cpus_are_not_what_was_measured_beside_a_gpu(job, monkeypatch):
    plan = make_plan(job, lambda texts: 1000.0)
    monkeypatch.setattr(module, "on_gpu", lambda: True)
    with pytest.raises(ConfigError, match="plan on a machine without"):
        what_if({"cpu": 1}, plan, job)
