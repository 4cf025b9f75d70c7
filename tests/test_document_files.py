import numpy as np
import pyarrow as pa
import pytest

from pipeline.search import document_files
from pipeline.search.document_files import SCHEMA, Documents, DocumentsWriter
from tests.conftest import stored_documents


def rows_of(ordinals, name="d"):
    """A table in no order: one row per ordinal given, those of equal ordinals told apart by doc_id."""
    columns = {
        "ordinal": ordinals,
        "doc_id": [f"{name}{number}" for number in range(len(ordinals))],
        "passage": [0] * len(ordinals),
        "start": [0] * len(ordinals),
        "end": [1] * len(ordinals),
        "text": [f"text {ordinal}" for ordinal in ordinals],
        "source_uri": ["file:///c"] * len(ordinals),
        "source_row": [0] * len(ordinals),
        "metadata": [None] * len(ordinals),
    }
    columns["truncated"] = [False] * len(ordinals)
    return pa.table({name: columns[name] for name in SCHEMA.names}, schema=SCHEMA)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Ordinals 0 to 3999, ordinal 1500 with 600 more rows, over files of at least 1,000 rows."""
    monkeypatch.setattr(document_files, "FILE_ROWS", 1000)
    with DocumentsWriter(tmp_path, 4600) as writer:
        for first in range(0, 4000, 700):
            ordinals = list(range(first, min(first + 700, 4000)))
            writer.write(rows_of((ordinals + [1500] * 600 if 1500 in ordinals else ordinals)[::-1]))
            writer.write(rows_of([]))
    return writer


def test_files_end_at_their_length_and_say_where_they_begin(written, tmp_path):
    assert [(file.name, file.first, file.rows) for file in written.files] == [
        ("documents-0000.arrow", 0, 1400),
        ("documents-0001.arrow", 1400, 1300),
        ("documents-0002.arrow", 2100, 1400),
        ("documents-0003.arrow", 3500, 500),
    ]
    assert written.rows == 4600 == sum(len(stored_documents(tmp_path, file.name)) for file in written.files)
    ordinals = np.concatenate([stored_documents(tmp_path, file.name)["ordinal"].to_numpy() for file in written.files])
    assert (np.diff(ordinals) >= 0).all()


def test_every_row_of_an_ordinal_is_found_whatever_file_it_is_in(written, tmp_path):
    found = Documents(tmp_path, written.files).rows(np.array([3999, 0, 1399, 1400, 1500, 2099, 2100, 3500]))
    assert {ordinal: len(rows) for ordinal, rows in found.items()} == {
        3999: 1, 0: 1, 1399: 1, 1400: 1, 1500: 601, 2099: 1, 2100: 1, 3500: 1,
    }  # fmt: skip
    assert all(row["text"] == f"text {ordinal}" for ordinal, rows in found.items() for row in rows)
    assert len({row["doc_id"] for row in found[1500]}) == 601
    assert Documents(tmp_path, written.files).rows(np.empty(0, dtype=np.int64)) == {}


def test_all_rows_can_be_walked_with_their_place(written, tmp_path):
    walked = list(Documents(tmp_path, written.files).batches(["ordinal"]))
    assert sum(len(batch) for *_, batch in walked) == 4600
    assert {name for name, *_ in walked} == {file.name for file in written.files}
    assert [first for _, first, _ in walked if first == 0] == [0] * 4


def test_few_rows_or_none_are_one_plainly_named_file(tmp_path):
    with DocumentsWriter(tmp_path, 3) as writer:
        writer.write(rows_of([0, 1, 2]))
    assert [file.name for file in writer.files] == ["documents.arrow"]
    with DocumentsWriter(tmp_path, 0) as writer:
        writer.write(rows_of([]))
    assert writer.files[0].rows == 0 == len(stored_documents(tmp_path))


def test_files_that_gc_deleted_are_read_on(tmp_path, written):
    documents = Documents(tmp_path, written.files)
    for file in tmp_path.iterdir():
        file.unlink()
    assert [row["text"] for row in documents.rows(np.array([7, 3999]))[3999]] == ["text 3999"]
    assert documents.passages_of("d0")
