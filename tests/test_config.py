import pytest

from pipeline.config_file import load_config, parse_config
from pipeline.errors import ConfigError
from tests.config_reference import FILE, reference

MINIMAL = {"root": "/tmp/root", "corpus": {"uri": "/tmp/corpus"}}


def test_load_config_reads_file_and_overrides(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("root: /r\ncorpus: {uri: /c}\nindex: {kind: flat}\n")
    config = load_config(file, ("index.kind=ivfpq", "search.k=5", "encoder.query_prompt=query: "))
    assert (config.index.kind, config.search.k, config.encoder.query_prompt) == ("ivfpq", 5, "query: ")


@pytest.mark.parametrize(
    ("section", "key", "expected"),
    [("corpus", "ury", "did you mean uri?"), ("index", "n_list", "did you mean nlist?"), ("index", "zzz", "known keys: kind")],
)
def test_unknown_key_is_an_error_with_a_suggestion(section, key, expected):
    data = MINIMAL | {section: MINIMAL.get(section, {}) | {key: 1}}
    with pytest.raises(ConfigError, match=f"{section}.{key}: unknown key") as error:
        parse_config(data)
    assert expected in str(error.value)


@pytest.mark.parametrize("override", ["index", "=3", "root.a=1", "index.kind=[1,", "index.m=2024-02-30"])
def test_bad_override_is_an_error(tmp_path, override):
    file = tmp_path / "c.yaml"
    file.write_text("root: /r\ncorpus: {uri: /c}\n")
    with pytest.raises(ConfigError, match="--set"):
        load_config(file, (override,))


@pytest.mark.parametrize("text", ["- a\n", "a: [", "\xff", "root: 2024-02-30\n"])
def test_broken_file_is_an_error_naming_it(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=str(file)):
        load_config(file)


def test_missing_and_huge_files_are_errors(tmp_path):
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(tmp_path / "none.yaml")
    big = tmp_path / "big.yaml"
    big.write_bytes(b"#" * (2 << 20))
    with pytest.raises(ConfigError, match="over the limit"):
        load_config(big)


@pytest.mark.parametrize(
    ("root", "corpus"),
    [
        ("/data/corpus/index", "/data/corpus"),
        ("s3://b/c/i", "s3://b/c/"),
        ("docs/i", "./docs"),
        ("./x", "x"),
        ("docs/i", "docs/*.txt"),
        ("index", "."),
    ],
)
def test_root_inside_corpus_is_refused(root, corpus):
    with pytest.raises(ConfigError, match="feed on itself"):
        parse_config({"root": root, "corpus": {"uri": corpus}})


def test_secrets_do_not_show():
    config = parse_config(MINIMAL | {"store": {"s3": {"key": "AKIA123", "secret": "hush"}}})
    assert "hush" not in repr(config) + str(config.model_dump(mode="json"))


def test_reference_is_current_and_is_the_default():
    assert FILE.read_text() == reference(), "run make config-reference"
    config = load_config(FILE)
    assert config == parse_config({"root": "/shared/index", "corpus": {"uri": "/shared/corpus"}})


def test_a_date_is_text_where_text_is_meant(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("root: /r\ncorpus: {uri: /c}\n")
    assert load_config(file, ("root=2024-06-01",)).root == "2024-06-01"
