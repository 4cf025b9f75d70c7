"""What travels to a cluster: names, config, code."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.errors import ConfigError
from pipeline.operations.submission import CONFIG_NAME, digest, pack, portable, secret_environment
from tests.conftest import make_config

KEYS = {"s3": {"key": "AKIDEXAMPLE", "secret": "wJalrXUtnFEMI", "endpoint_url": "http://localhost:1"}}


def secrets_of(model, where=()):
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from secrets_of(kind, (*where, name))
        elif "SecretStr" in repr(kind):
            yield ".".join((*where, name))


def test_a_packed_config_reads_back_with_absolute_paths_and_without_secrets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    config = make_config(
        "index", "file://corpus/*.jsonl", corpus={"metadata": ["kind", "1e-3", "😀: x"]}, encoder={"model": "model"},
        store=KEYS, compute={"address": "ray://head:10001"}, publish={"min_recall": 1e-05},
    )  # fmt: skip
    pack(tmp_path / "model", config, with_code=False)
    assert [path.name for path in (tmp_path / "model").iterdir()] == [CONFIG_NAME]
    text = (tmp_path / "model" / CONFIG_NAME).read_text()
    assert "AKIDEXAMPLE" not in text
    assert "wJalrXUtnFEMI" not in text
    assert "***" not in text
    read = load_config(tmp_path / "model" / CONFIG_NAME)
    assert (read.root, read.corpus.uri) == (f"{tmp_path}/index", f"{tmp_path}/corpus/*.jsonl")
    assert (read.encoder.model, read.compute.address) == (f"{tmp_path}/model", None)
    assert (read.corpus.metadata, read.publish.min_recall) == (("kind", "1e-3", "😀: x"), 1e-05)
    assert read.store.s3.endpoint_url == "http://localhost:1"
    assert digest(read.model_copy(update={"encoder": config.encoder, "corpus": config.corpus})) == digest(config)


def test_names_of_models_and_uris_stay_as_they_are():
    config = make_config("s3://bucket/root", "s3://bucket/corpus")
    text = portable(config)
    assert "root: s3://bucket/root" in text
    assert f"model: {config.encoder.model}" in text


def test_secrets_travel_in_the_environment_and_there_are_no_others():
    assert secret_environment(make_config("r", "c", store=KEYS).store.s3) == {
        "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI",
    }
    assert secret_environment(make_config("r", "c").store.s3) == {}
    assert sorted(secrets_of(Config)) == ["store.s3.key", "store.s3.secret"], "a new secret of a run must travel too"


def test_packed_code_is_all_that_runs(tmp_path):
    pack(tmp_path, make_config("r", "c"), with_code=True)
    home = Path(__file__).parent.parent
    for package in ("pipeline", "jobs"):
        sources = {path.relative_to(home) for path in (home / package).rglob("*.py")}
        assert {path.relative_to(tmp_path) for path in (tmp_path / package).rglob("*.py")} == sources
    assert not list(tmp_path.rglob("__pycache__"))


def test_digest_is_of_the_work_and_not_of_how_it_is_done():
    config = make_config("root", "corpus")
    assert digest(make_config("root", "corpus", compute={"encoders": 3}, publish={"min_recall": 0.9})) == digest(config)
    others = [
        make_config("other", "corpus"),
        make_config("root", "other"),
        make_config("root", "corpus", index={"kind": "flat"}),
    ]
    assert len({digest(config), *map(digest, others)}) == 4


def test_a_root_in_memory_is_refused():
    with pytest.raises(ConfigError, match="a job needs a folder that all nodes share"):
        portable(make_config("memory://root", "corpus"))
