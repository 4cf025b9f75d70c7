import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import StoreConfig
from pipeline.config_what import CorpusConfig
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.ingest.corpus import RejectedRow, SourceDocument, choose_files, normalise, read_documents
from pipeline.ingest.formats import count_rows
from pipeline.ingest.listing import list_files
from pipeline.ingest.slices import Slice
from tests.conftest import write_jsonl

ROWS = [{"id": 7, "text": "seven", "lang": "en"}, {"id": "x", "text": "line one\nline two", "lang": None}]


def read(uri, **settings):
    corpus = CorpusConfig(uri=str(uri), **settings)
    files = choose_files(list_files(str(uri), StoreConfig()), corpus)
    slices = [Slice(uri=file.uri, size_bytes=file.size_bytes, content="", format=kind) for file, kind in files]
    rows = [row for part in slices for row in read_documents(part, corpus, StoreConfig())]
    assert sum(count_rows(part, StoreConfig()) for part in slices) == len(rows)
    return rows


def slice_of(file):
    kind = choose_files(list_files(str(file), StoreConfig()), CorpusConfig(uri=str(file)))[0][1]
    return Slice(uri=str(file), size_bytes=1, content="", format=kind)


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize(
    ("name", "pack"),
    [("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstd), ("a.ndjson", bytes)],
)
def test_jsonl_plain_and_compressed(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(jsonl(ROWS)))
    found = read(tmp_path, metadata=("lang",))
    assert [(row.doc_id, row.text, row.metadata, row.source_row) for row in found] == [
        ("7", "seven", '{"lang": "en"}', 0),
        ("x", "line one\nline two", '{"lang": null}', 1),
    ]
    assert found[0].source_uri == str(tmp_path / name)


def test_gzip_members_one_after_the_other(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(ROWS[:1]), mtime=0) + gzip.compress(jsonl(ROWS[1:])))
    assert len(read(tmp_path)) == 2


def test_jsonl_bom_crlf_and_blank_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"id": "a", "text": "x"}\r\n\r\n{"id": "b", "text": "y"}')
    assert [row.doc_id for row in read(tmp_path)] == ["a", "b"]


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.csv.gz", ",")])
def test_delimited_keeps_ids_and_na_as_text(tmp_path, name, delimiter):
    lines = [["id", "text"], ["007", "NA"], ["1e5", '"a ""quoted""\nnewline"']]
    data = "\n".join(delimiter.join(line) for line in lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith("gz") else data)
    assert [(row.doc_id, row.text) for row in read(tmp_path)] == [("007", "NA"), ("1e5", 'a "quoted"\nnewline')]


def test_delimited_ragged_row_is_rejected_alone(tmp_path):
    (tmp_path / "a.csv").write_text("id,text\n1,a\n2,b,c\n3,d\n")
    found = read(tmp_path)
    assert [type(row) for row in found] == [SourceDocument, RejectedRow, SourceDocument]
    assert (found[1].code, found[1].source_row) == ("E_COLUMNS", 1)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()])
def test_parquet_string_types_are_one(tmp_path, kind):
    text = pa.array(["a", "b", None]).cast(kind) if kind != pa.string_view() else pa.array(["a", "b", None], kind)
    pq.write_table(pa.table({"id": pa.array([1, 2, 3]), "text": text}), tmp_path / "a.parquet")
    found = read(tmp_path)
    assert [row.doc_id for row in found] == ["1", "2", "3"]
    assert [getattr(row, "text", None) for row in found] == ["a", "b", None]
    assert found[2].code == "E_NULL_TEXT"


def test_parquet_row_groups_keep_their_row_numbers(tmp_path):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": list(range(10)), "text": [f"t{n}" for n in range(10)]}), file, row_group_size=3)
    part = Slice(uri=str(file), size_bytes=1, content="", format="parquet", first_row_group=1, end_row_group=3)
    found = list(read_documents(part, CorpusConfig(uri=str(file)), StoreConfig()))
    assert [(row.doc_id, row.source_row) for row in found] == [(str(n), n) for n in range(3, 9)]


def test_parquet_invalid_utf8_rejects_the_row_not_the_file(tmp_path):
    text = pa.array([b"fine", b"\xff\xfe", b"also"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"id": ["a", "b", "c"], "text": text}), tmp_path / "a.parquet")
    found = read(tmp_path)
    assert [getattr(row, "code", "ok") for row in found] == ["ok", "E_UTF8", "ok"]
    assert found[1].doc_id == "b"


def test_text_files_are_named_by_their_path(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("alpha")
    (tmp_path / "sub" / "b.md").write_text("beta")
    assert [(row.doc_id, row.text) for row in read(tmp_path)] == [("a.txt", "alpha"), ("sub/b.md", "beta")]
    assert [row.doc_id for row in read(tmp_path / "a.txt")] == ["a.txt"]
    assert [row.doc_id for row in read(tmp_path / "*.txt")] == ["a.txt"]


@pytest.mark.parametrize("settings", [{}, {"format": "beir"}])
def test_beir_folder(tmp_path, settings):
    write_jsonl(
        tmp_path / "corpus.jsonl", [{"_id": 1, "title": "T", "text": "body"}, {"_id": "2", "title": "", "text": "only"}]
    )
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "q", "text": "?"}])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n")
    assert [(row.doc_id, row.text) for row in read(tmp_path, **settings)] == [("1", "T body"), ("2", "only")]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ('{"id": "a", "text": null}', "E_NULL_TEXT"),
        ('{"id": "a"}', "E_NULL_TEXT"),
        ('{"id": "a", "text": "  \\u200b\\u00a0 "}', "E_EMPTY_TEXT"),
        ('{"id": "a", "text": ""}', "E_EMPTY_TEXT"),
        ('{"id": "a", "text": 5}', "E_TYPE"),
        ('{"id": "a", "text": NaN}', "E_TYPE"),
        ('{"id": "a", "text": ["x"]}', "E_TYPE"),
        ('{"id": "a", "text": "\\ud800"}', "E_UTF8"),
        ('{"text": "x"}', "E_NULL_ID"),
        ('{"id": "", "text": "x"}', "E_NULL_ID"),
        ('{"id": 1.5, "text": "x"}', "E_TYPE"),
        ('{"id": true, "text": "x"}', "E_TYPE"),
        ('{"id": "a", "text": "x"', "E_JSON"),
        ("[1, 2]", "E_JSON"),
        ("[" * 100_000, "E_JSON"),
    ],
)
def test_bad_rows_are_rejected_with_a_code(tmp_path, line, code):
    (tmp_path / "a.jsonl").write_text('{"id": "0", "text": "good"}\n' + line + '\n{"id": "1", "text": "good"}\n')
    found = read(tmp_path)
    assert [getattr(row, "code", "ok") for row in found] == ["ok", code, "ok"]
    assert (found[1].source_row, found[1].source_uri) == (1, str(tmp_path / "a.jsonl"))
    assert found[1].message


def test_control_characters_go_and_nfc_is_made():
    assert normalise(" a\x00b\x1bc\td\n") == "abc\td"
    assert normalise("e\u0301") == "é"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.parquet", b"<html>no</html>", "E_NOT_PARQUET, starts with b'<htm'"),
        ("a.parquet", b"PAR1 cut off", "E_PARQUET_TRUNCATED"),
        ("a.jsonl", b"", "E_EMPTY_FILE"),
        ("a.jsonl.gz", b"not gzip", "E_COMPRESSION"),
        ("a.jsonl.gz", gzip.compress(b'{"id": 1}' * 99, mtime=0)[:-9], "E_COMPRESSION"),
        ("a.jsonl.zst", b"not zstd", "E_COMPRESSION"),
        ("a.csv", b"id,body\n1,x\n", "E_SCHEMA, wanted column 'text', the file has id, body"),
    ],
)
def test_bad_files_stop_the_run_by_name(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_mixed_formats_and_unknown_endings_are_refused(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(DataError, match="several formats, jsonl, text"):
        read(tmp_path)
    (tmp_path / "only.bin").write_text("x")
    with pytest.raises(ConfigError, match=r"no file ends in \.parquet"):
        read(tmp_path / "only.bin")


def test_tsv_has_no_quoting_so_no_row_swallows_the_next(tmp_path):
    (tmp_path / "a.tsv").write_text('id\ttext\n1\t"Hello world\n007\tNA\n3\tsays "x"\n')
    assert [(row.doc_id, row.text) for row in read(tmp_path)] == [("1", '"Hello world'), ("007", "NA"), ("3", 'says "x"')]


def test_csv_with_an_unclosed_quote_stops_the_run(tmp_path):
    (tmp_path / "a.csv").write_text('id,text\n1,"open\n2,b\n')
    with pytest.raises(DataError, match=r"a\.csv: E_CSV"):
        read(tmp_path)


@pytest.mark.parametrize(("value", "code"), [('"\\ud800"', "E_UTF8"), ("NaN", "E_TYPE")])
def test_metadata_that_cannot_be_stored_rejects_its_row(tmp_path, value, code):
    (tmp_path / "a.jsonl").write_text(f'{{"id": "a", "text": "x", "m": {value}}}\n{{"id": "b", "text": "y", "m": 1}}\n')
    assert [getattr(row, "code", "ok") for row in read(tmp_path, metadata=("m",))] == [code, "ok"]


def test_truncated_and_damaged_gzip_name_the_file(tmp_path):
    packed = bytearray(gzip.compress(b"some text that is long enough to be packed " * 50, mtime=0))
    (tmp_path / "a.txt.gz").write_bytes(packed[:-9])
    with pytest.raises(DataError, match=r"a\.txt\.gz: E_COMPRESSION"):
        read(tmp_path)
    packed[len(packed) // 2] ^= 0xFF
    packed[len(packed) // 2 + 1] ^= 0xFF
    (tmp_path / "a.txt.gz").write_bytes(packed)
    with pytest.raises(DataError, match=r"a\.txt\.gz: E_COMPRESSION"):
        read(tmp_path)


def test_binary_columns_are_text_in_metadata_too_and_an_empty_id_is_none(tmp_path):
    columns = {name: pa.array(values, pa.binary()) for name, values in
               {"id": [b"a", b""], "text": [b"one", b"two"], "lang": [b"en", b"\xff"]}.items()}  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    good, bad = read(tmp_path, metadata=("lang",))
    assert (good.doc_id, good.metadata, bad.code) == ("a", '{"lang": "en"}', "E_NULL_ID")


def test_moments_beyond_those_of_python_are_metadata_as_any(tmp_path):
    moments = pa.array([0, 253402300800000000], pa.timestamp("us"))  # the second is the year 10000
    pq.write_table(pa.table({"id": ["a", "b"], "text": ["one", "two"], "at": moments}), tmp_path / "a.parquet")
    assert [json.loads(row.metadata)["at"][:5] for row in read(tmp_path, metadata=("at",))] == ["1970-", "10000"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.parquet"])
def test_a_file_that_its_storage_does_not_give_is_no_bad_file(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(b"x")

    def refuse(storage, path, ahead_bytes=None):
        raise PermissionError(13, "the key of this object is not for you")

    monkeypatch.setattr("pipeline.root.storage.Storage.open", refuse)
    with pytest.raises(StorageError, match=rf"{name}: cannot read it, .*the key of this object"):
        list(read_documents(slice_of(tmp_path / name), CorpusConfig(uri=str(tmp_path)), StoreConfig()))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.parquet"])
def test_nor_is_one_whose_bytes_stop_coming(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(b"x")

    class Broken(io.BytesIO):
        def read(self, size=-1):
            raise OSError(121, "the service is away")

        readinto = readline = read

    monkeypatch.setattr("pipeline.root.storage.Storage.open", lambda storage, path, ahead_bytes=None: Broken(b"x" * 100))
    with pytest.raises(StorageError, match=rf"{name}: cannot read it, .*the service is away"):
        list(read_documents(slice_of(tmp_path / name), CorpusConfig(uri=str(tmp_path)), StoreConfig()))
