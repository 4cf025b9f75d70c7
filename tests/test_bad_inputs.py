"""Bad inputs by the numbers of the list that users are promised: what each becomes, named by code, file and row."""

import gzip
import json
import os
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.ann.index_plan import choose
from pipeline.config_file import load_config
from pipeline.config_what import IndexConfig, PassagesConfig
from pipeline.encoder import Encoder
from pipeline.encoding.model import resolve_spec
from pipeline.encoding.tokenizer import TextTokenizer
from pipeline.encoding.windows import SEGMENT_CHARS
from pipeline.errors import BadFileError, ConfigError, DataError, EncoderError
from pipeline.ingest import slices
from pipeline.ingest.corpus import choose_files, read_documents
from pipeline.ingest.listing import list_files
from pipeline.ingest.passages import Splitter
from pipeline.ingest.slices import Slice
from pipeline.ingest.validation import validate
from pipeline.root.storage import Storage
from tests.conftest import make_config, write_jsonl

GOOD = [{"id": "a", "text": "one"}, {"id": "b", "text": "two"}]


def check(folder, **corpus):
    return validate(make_config(folder.parent / "root", folder, corpus=corpus))


def parquet(file, columns, **options):
    pq.write_table(pa.table(columns), file, **options)


def texts(count=3):
    return {"id": [f"d{number}" for number in range(count)], "text": [f"text {number}" for number in range(count)]}


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    return folder


def test_02_parquet_without_rows_is_accepted(corpus):
    parquet(corpus / "a.parquet", texts())
    pq.write_table(pa.table({"id": pa.array([], pa.string()), "text": pa.array([], pa.string())}), corpus / "b.parquet")
    assert check(corpus).counts["documents"] == 3


def damaged(kind, file):
    """Write a file that cannot be read."""
    parquet(file, texts(2000), compression="snappy" if kind == "page" else "none", write_page_checksum=True)
    data = bytearray(file.read_bytes())
    if kind in {"page", "bit"}:
        data[200] ^= 0xFF
    file.write_bytes(data[: len(data) // 2] if kind == "truncated" else data)


@pytest.mark.parametrize(
    ("number", "name", "data", "code"),
    [
        (1, "a.parquet", b"", "E_EMPTY_FILE"),
        (4, "a.parquet", b"<html><body>not found</body></html>", "E_NOT_PARQUET, starts with b'<htm'"),
        (4, "a.parquet", b'{"id": "a", "text": "x"}\n', "E_NOT_PARQUET"),
        (18, "a.parquet", b"PARE" + bytes(40) + b"PARE", "E_UNSUPPORTED"),
        (57, "a.jsonl", b"", "E_EMPTY_FILE"),
        (57, "a.csv", b"", "E_EMPTY_FILE"),
        (60, "a.csv", b'id,text\n1,"never closed\n2,b\n', "E_CSV"),
        (24, "a.csv", b"id,text,text\n1,a,b\n", "E_SCHEMA, column 'text' is there more than once"),
        (24, "a.csv", b"id,Text\n1,a\n", "E_SCHEMA, wanted column 'text', the file has id, Text; did you mean 'Text'"),
    ],
)  # fmt: skip
def test_files_that_are_not_what_they_should_be(corpus, number, name, data, code):
    (corpus / name).write_bytes(data)
    try:
        found = check(corpus)
    except BadFileError as error:
        text = str(error)
    else:
        (text,) = found.bad_files
        assert not found.ok
    assert text.startswith(f"{corpus / name}: ")
    assert code in text


@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [(3, "truncated", "E_PARQUET_TRUNCATED"), (5, "page", "E_PARQUET_CORRUPT"), (6, "bit", "E_PARQUET_CORRUPT")],
)
def test_damaged_parquet_names_the_file(corpus, number, kind, code):
    damaged(kind, corpus / "a.parquet")
    (text,) = check(corpus).bad_files
    assert text.startswith(f"{corpus / 'a.parquet'}: {code}, ")
    skipped = check(corpus, on_error="skip_file")
    assert (skipped.counts["skipped_files"], skipped.bad_files) == (1, [])


def test_07_files_that_unfold_without_end_are_refused(corpus, monkeypatch):
    monkeypatch.setattr(slices, "BOMB_BYTES", 1 << 20)
    line = json.dumps({"id": "a", "text": "x" * 1000}).encode() + b"\n"
    (corpus / "a.jsonl.gz").write_bytes(gzip.compress(line * 20_000))
    assert "E_BOMB" in check(corpus).bad_files[0]
    (corpus / "a.jsonl.gz").unlink()
    parquet(corpus / "a.parquet", {"id": [str(n) for n in range(300)], "text": ["x" * 100_000] * 300}, compression="zstd")
    assert "E_BOMB" in check(corpus).bad_files[0]


def test_08_a_huge_row_group_is_read_in_batches(corpus):
    count = 5000
    parquet(
        corpus / "a.parquet", {"id": list(range(count)), "text": [f"{n} " * 200 for n in range(count)]}, row_group_size=count
    )
    assert check(corpus).counts["documents"] == count


def test_09_a_missing_path_names_the_nearest_folder(corpus):
    with pytest.raises(ConfigError, match=f"no input files there; the nearest folder that exists is {corpus}$"):
        check(corpus / "no" / "such")


def test_10_a_folder_without_known_endings_says_which_are_known(corpus):
    (corpus / "a.docx").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"no file ends in \.parquet, .*set corpus.format"):
        check(corpus)


def test_11_hidden_and_temporary_files_are_left_out_and_named(corpus):
    write_jsonl(corpus / "a.jsonl", GOOD)
    hidden = [corpus / "_SUCCESS", corpus / ".a.jsonl.crc", corpus / "_temporary" / "b.jsonl"]
    for file in hidden:
        write_jsonl(file, [{"id": "hidden", "text": "hidden"}])
    found = check(corpus)
    assert found.counts["documents"] == 2
    assert set(found.ignored) == {str(file) for file in hidden}


def test_12_a_glob_that_matches_twice_reads_a_file_once(corpus):
    write_jsonl(corpus / "a.jsonl", GOOD)
    found = validate(make_config(corpus.parent / "root", f"{corpus}/*[a]*.jsonl"))
    assert (found.files, found.counts["rows"]) == (1, 2)


@pytest.mark.timeout(60)
def test_13_loops_and_special_files_do_not_hang(corpus):
    write_jsonl(corpus / "a.jsonl", GOOD)
    os.mkfifo(corpus / "b.jsonl")
    (corpus / "loop").symlink_to(corpus)
    assert check(corpus).counts["documents"] == 2


NAMES = (
    *("with space.jsonl", "100%.jsonl", "a#b.jsonl", "what?.jsonl", "ü数🙂.jsonl", "line\nbreak.jsonl", "a..b.jsonl"),
    "x" * 200 + ".jsonl",
)


def test_14_names_with_any_characters_are_read(corpus):
    for number, name in enumerate(NAMES):
        write_jsonl(corpus / name, [{"id": str(number), "text": name}])
    found = check(corpus)
    assert (found.files, found.counts["documents"], found.codes) == (len(NAMES), len(NAMES), {})


@pytest.mark.parametrize("change", ["other bytes", "gone"])
def test_16_a_file_changed_since_it_was_listed(corpus, change):
    file = write_jsonl(corpus / "a.jsonl", GOOD)
    config = make_config(corpus.parent / "root", corpus)
    ((info, kind),) = choose_files(list_files(str(corpus), config.store), config.corpus)
    if change == "gone":
        file.unlink()
    else:
        write_jsonl(file, [*GOOD, {"id": "c", "text": "three"}])
    part = Slice(uri=info.uri, size_bytes=info.size_bytes, stamp=info.stamp, content="", format=kind)
    with pytest.raises(BadFileError, match=f"{file}: E_INPUT_CHANGED") as error:
        list(read_documents(part, config.corpus, config.store))
    assert error.value.code == "E_INPUT_CHANGED"


def test_17_mixed_formats_are_refused_unless_one_is_named(corpus):
    write_jsonl(corpus / "a.jsonl", GOOD)
    (corpus / "b.csv").write_text("id,text\nc,three\n")
    with pytest.raises(DataError, match=r"files of several formats, csv, jsonl; set corpus\.format"):
        check(corpus)


@pytest.mark.parametrize(
    ("number", "columns", "code"),
    [
        (19, {"id": ["a"], "body": ["x"]}, "E_SCHEMA, wanted column 'text', the file has id, body"),
        (23, {"id": ["a"], "text": [["x"]]}, "E_TYPE, column 'text' is list"),
        (23, {"id": ["a"], "text": [1.5]}, "E_TYPE, column 'text' is double"),
        (23, {"id": ["a"], "text": [True]}, "E_TYPE, column 'text' is bool"),
        (23, {"id": ["a"], "text": [{"x": 1}]}, "E_TYPE, column 'text' is struct"),
        (29, {"id": [1.5], "text": ["x"]}, "E_TYPE, column 'id' is double"),
    ],
)
def test_parquet_of_another_schema_names_the_file(corpus, number, columns, code):
    parquet(corpus / "a.parquet", texts())
    parquet(corpus / "b.parquet", columns)
    (text,) = check(corpus).bad_files
    assert text.startswith(f"{corpus / 'b.parquet'}: {code}")


def test_20_ids_are_strings_whatever_the_files_have(corpus):
    """The list wants E_SCHEMA unless ids are cast to strings; here they always are, as ``corpus.id`` says."""
    parquet(corpus / "a.parquet", {"id": [7, 8], "text": ["x", "y"]})
    parquet(corpus / "b.parquet", {"id": ["7", "08"], "text": ["z", "w"]})
    found = check(corpus)
    assert (found.counts["documents"], found.codes) == (2, {"E_DUP_ID": 2})


def test_22_binary_texts_are_decoded_row_by_row(corpus):
    column = pa.array(["grün".encode(), "grün".encode("latin-1")], pa.binary())
    parquet(corpus / "a.parquet", {"id": ["a", "b"], "text": column})
    found = check(corpus)
    assert [(row.source_row, row.doc_id, row.code) for row in found.rejected] == [(1, "b", "E_UTF8")]


def test_25_extension_types_are_refused(corpus):
    class Pickled(pa.ExtensionType):
        def __init__(self):
            super().__init__(pa.binary(), "ray.data.arrow_pickled_object")

        def __arrow_ext_serialize__(self):
            return b""

    column = pa.ExtensionArray.from_storage(Pickled(), pa.array([b"x"], pa.binary()))
    parquet(corpus / "a.parquet", {"id": ["a"], "text": ["x"], "other": column})
    assert "E_UNSUPPORTED" in check(corpus).bad_files[0]


def test_26_columns_that_nobody_wants_are_not_read(corpus):
    nested = pa.array([1])
    for _ in range(60):
        nested = pa.StructArray.from_arrays([nested], ["x"])
    wide = {f"c{number}": [number] for number in range(2000)}
    parquet(corpus / "a.parquet", {"id": ["a"], "text": ["x"], "deep": nested} | wide)
    assert check(corpus).counts["documents"] == 1


TAG_CHARACTERS = "".join(chr(0xE0000 + ord(char)) for char in "hidden")


@pytest.mark.parametrize(
    ("number", "line", "code"),
    [
        (27, '{"id": "x", "text": null}', "E_NULL_TEXT"),
        (28, '{"id": "x", "text": "   "}', "E_EMPTY_TEXT"),
        (28, json.dumps({"id": "x", "text": TAG_CHARACTERS}), "E_EMPTY_TEXT"),
        (29, '{"id": "x", "text": NaN}', "E_TYPE"),
        (30, '{"id": "x", "text": 7}', "E_TYPE"),
        (31, b'{"id": "x", "text": "\xff"}', "E_UTF8"),
        (32, '{"id": "x", "text": "\\ud800"}', "E_UTF8"),
        (47, '{"id": null, "text": "t"}', "E_NULL_ID"),
        (50, json.dumps({"id": "x" * 10_000, "text": "t"}), "E_ID_TOO_LONG"),
        (55, '{"id": {"a": 1}, "text": "t"}', "E_TYPE"),
        (56, '{"id": "x", "text": "t", "text": "u"}', "E_DUP_KEY"),
        (59, '{"id": "x", "text": "t", "score": Infinity}', "E_TYPE"),
    ],
)
def test_bad_rows_are_put_aside_with_their_row(corpus, number, line, code):
    data = line if isinstance(line, bytes) else line.encode()
    good = [json.dumps(row).encode() for row in GOOD]
    (corpus / "a.jsonl").write_bytes(b"\n".join([good[0], data, good[1]]) + b"\n")
    found = check(corpus)
    assert [(row.source_uri, row.source_row, row.code) for row in found.rejected] == [(str(corpus / "a.jsonl"), 1, code)]
    assert (found.counts["documents"], found.counts["rows"], found.ok) == (2, 3, True)
    assert not check(corpus, on_error="abort").ok


@pytest.mark.parametrize(
    ("number", "text", "expected"),
    [
        (33, "nul\x00 and\x07 bell", "nul and bell"),
        (36, "a\u202eb" + "e" + "\u0301" * 3, "a\u202eb" + "é" + "\u0301" * 2),
        (37, "e\u0301", "é"),
        (35, "x" * 1_000_000, "x" * 1_000_000),
    ],
)
def test_odd_texts_are_kept_and_made_nfc(corpus, number, text, expected):
    write_jsonl(corpus / "a.jsonl", [{"id": "x", "text": text}])
    config = make_config(corpus.parent / "root", corpus)
    ((info, kind),) = choose_files(list_files(str(corpus), config.store), config.corpus)
    part = Slice(uri=info.uri, size_bytes=info.size_bytes, stamp=info.stamp, content="", format=kind)
    (document,) = read_documents(part, config.corpus, config.store)
    assert document.text == expected


def test_45_46_rows_of_one_id(corpus):
    rows = [*GOOD, GOOD[0], {"id": "b", "text": "not two"}]
    write_jsonl(corpus / "a.jsonl", rows)
    found = check(corpus)
    assert (found.counts["documents"], found.counts["duplicates"], found.counts["rejected"]) == (1, 1, 2)
    assert [(row.source_row, row.code) for row in found.rejected] == [(1, "E_DUP_ID"), (3, "E_DUP_ID")]


def test_48_60_csv_values_stay_what_is_written(corpus):
    (corpus / "a.csv").write_text('id,text\n007,NA\n1e5,null\n-1,N/A\n18446744073709551616,"a\nb"\nragged\n')
    found = check(corpus)
    assert (found.counts["documents"], [(row.source_row, row.code) for row in found.rejected]) == (4, [(4, "E_COLUMNS")])


def test_49_ids_of_any_size_are_strings(corpus):
    parquet(corpus / "a.parquet", {"id": pa.array([2**64 - 1, 0], pa.uint64()), "text": ["x", "y"]})
    parquet(corpus / "b.parquet", {"id": pa.array([-1, -(2**63)], pa.int64()), "text": ["z", "w"]})
    assert check(corpus).counts["documents"] == 4


def test_50_terminal_escapes_in_ids_and_texts_are_shown_escaped(corpus):
    write_jsonl(corpus / "a.jsonl", [*GOOD, {"id": "x", "text": "\u200b"}, {"id": "z", "text": "\u200b\x1b"}])
    rejected = check(corpus).rejected
    assert [(row.doc_id, row.text_head) for row in rejected] == [("x", "\\u200b"), ("z", "\\u200b\\x1b")]


def test_52_deleting_what_is_not_there_is_no_error(corpus):
    write_jsonl(corpus / "a.jsonl", GOOD)
    (corpus.parent / "gone.csv").write_text("id\na\nnobody\n")
    found = check(corpus, deletes=str(corpus.parent / "gone.csv"))
    assert (found.counts["documents"], found.counts["deleted"], found.ok) == (1, 1, True)


def test_53_a_line_without_end_is_put_aside(corpus, monkeypatch):
    monkeypatch.setattr("pipeline.ingest.formats.MAX_LINE_BYTES", 1 << 16)
    write_jsonl(corpus / "a.jsonl", [GOOD[0], {"id": "long", "text": "x" * 200_000}, GOOD[1]])
    found = check(corpus)
    assert [(row.source_row, row.code) for row in found.rejected] == [(1, "E_LINE_TOO_LONG")]
    assert found.counts["documents"] == 2


def test_54_a_cut_last_line_is_put_aside_and_said(corpus):
    (corpus / "a.jsonl").write_bytes(json.dumps(GOOD[0]).encode() + b'\n{"id": "b", "te')
    (row,) = check(corpus).rejected
    assert (row.source_row, row.code) == (1, "E_JSON")
    assert "was the file cut?" in row.message


def test_58_marks_line_ends_and_blank_lines_are_no_rows(corpus):
    (corpus / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"id": "a", "text": "x"}\r\n\r\n{"id": "b", "text": "y"}')
    assert check(corpus).counts == {"documents": 2, "rows": 2, "rejected": 0, "duplicates": 0, "replaced": 0, "deleted": 0}


def test_65_codes_that_do_not_divide_the_vectors_are_refused_before_any_work():
    with pytest.raises(ConfigError, match=r"index\.m: dim 384 cannot be cut into 50 parts; choose one of \[32, 48, 64, 96\]"):
        choose(IndexConfig(kind="ivfpq", m=50), 10_000, 384)


def test_66_more_lists_than_vectors_are_lowered_or_refused():
    assert choose(IndexConfig(kind="ivfpq"), 50, 384).nlist <= 50


def test_67_a_misspelled_key_is_named_with_the_one_that_was_meant(tmp_path):
    with pytest.raises(ConfigError, match=r"corpus\.urii"):
        make_config(tmp_path / "root", tmp_path, corpus={"urii": "x"})


def test_70_an_output_inside_its_input_is_refused(corpus):
    write_jsonl(corpus / "a.jsonl", GOOD)
    with pytest.raises(ConfigError, match="root"):
        make_config(corpus / "root", corpus)


def test_06_without_checksums_a_flipped_bit_cannot_be_seen_and_is_only_another_text(corpus):
    """The limit that the documentation states: Parquet without page checksums does not tell."""
    parquet(corpus / "a.parquet", {"id": ["a"], "text": ["abcdefgh"]}, compression="none", use_dictionary=False)
    data = bytearray((corpus / "a.parquet").read_bytes())
    data[data.index(b"abcdefgh")] ^= 1
    (corpus / "a.parquet").write_bytes(data)
    assert check(corpus).counts["documents"] == 1


def test_14_names_with_any_characters_are_read_from_s3(s3, tmp_path):
    bucket = Storage(f"s3://test/{tmp_path.name}", s3.store_config)
    for number, name in enumerate(NAMES):
        bucket.put(f"corpus/{name}", json.dumps({"id": str(number), "text": name}).encode() + b"\n")
    found = validate(make_config(tmp_path / "root", bucket.at("corpus"), store=s3.store))
    assert (found.files, found.counts["documents"], found.codes) == (len(NAMES), len(NAMES), {})


@pytest.mark.timeout(60)
def test_34_a_document_of_ten_megabytes_is_tokenized_in_segments(minilm, monkeypatch):
    """A whole one costs the tokenizer 17 s and 1.5 GB; no piece it is given here is longer than two segments."""
    tokenizer = TextTokenizer(minilm[1], 256)
    longest = []
    for name in ("offsets", "_encode"):
        real = getattr(tokenizer, name)
        monkeypatch.setattr(tokenizer, name, lambda texts, real=real: longest.append(_longest(texts)) or real(texts))
    text = "some words and more of them " * 30_000 + "x" * 9_000_000
    (truncated,) = Splitter(tokenizer, PassagesConfig(long="truncate"), "")([text])
    assert [(passage.tokens, passage.truncated) for passage in truncated] == [(256, True)]
    assert max(longest) <= 2 * SEGMENT_CHARS


def _longest(texts):
    return len(texts) if isinstance(texts, str) else max(len(text) for text in texts)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("compute: {encoders: no}", "compute.encoders: Value error, found false (YAML for yes, no, on and off too)"),
        ("search: {k: yes}", "search.k: Value error, found true"),
        ("search: {k: 1e3}", "search.k: Input should be a valid integer"),
        ("corpus: {uri: 010}", "corpus.uri: Input should be a valid string"),
        ("search: !!python/object/apply:os.system [true]", "not valid YAML"),
        ("x: &x [a, a]\ny: &y [*x, *x]\nz: [*y, *y]", "x: unknown key"),
    ],
)
def test_68_yaml_surprises_are_errors_of_a_type(tmp_path, text, found):
    file = tmp_path / "c.yaml"
    rest = "" if text.startswith("corpus") else "corpus: {uri: /c}\n"
    file.write_text(f"root: /r\n{rest}{text}\n")
    with pytest.raises(ConfigError, match=re.escape(str(file))) as error:
        load_config(file)
    assert found in str(error.value)


def test_69_a_model_that_is_none_says_what_it_lacks(tmp_path, minilm):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text('{"model_type": "bert", "hidden_size": 8}')
    with pytest.raises(EncoderError, match=rf"{tmp_path}/plain: .*modules\.json.*; "):
        resolve_spec(model=str(tmp_path / "plain"))
    shutil.copytree(minilm[1].path, tmp_path / "own")
    modules = json.loads((tmp_path / "own" / "modules.json").read_text())
    modules[1]["type"] = "custom_pooling.CustomPooling"
    (tmp_path / "own" / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "own" / "custom_pooling.py").write_text("raise SystemExit('its code ran')\n")
    with pytest.raises(EncoderError, match=r"trust_remote_code"):
        Encoder(resolve_spec(model=str(tmp_path / "own"))[0])


@pytest.mark.parametrize(
    "uri", ["s3://key:hush@bucket/x", "s3://hush@bucket/x", "https://h/x?X-Amz-Signature=hush", "ssh://h/x"]
)
def test_uris_with_secrets_or_of_other_schemes_are_refused_without_showing_them(tmp_path, uri):
    for settings in ({"root": uri, "uri": str(tmp_path)}, {"root": tmp_path / "root", "uri": uri}):
        with pytest.raises(ConfigError) as error:
            check_uri(settings)
        assert "hush" not in str(error.value)


def check_uri(settings):
    config = make_config(**settings)
    Storage(config.root, config.store)
    validate(config)
