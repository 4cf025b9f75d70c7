"""Which documents of a corpus count: an id stands for one document, a deleted id for none.

Rows of one id with the same text are one document: the first counts. With other texts nobody can tell which is meant: all of
them are rejected (``E_DUP_ID``). In a corpus of ``mode: append`` the rows of the latest generation of files win, within it
those of the last file by URI. Ids of ``corpus.deletes`` count for nothing. What does not count is masked, row by row.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.ingest.corpus import RejectedRow, SourceDocument, rejected_document
from pipeline.ingest.ingestion import DOCUMENT_SCHEMA
from pipeline.ingest.passages import passage_key
from pipeline.root import layout
from pipeline.root.manifest import DataFile, Record
from pipeline.root.shards import KEY_DTYPE, Keys, is_among, keys_of, read_columns
from pipeline.root.storage import Storage

KEPT, DUPLICATE, REPLACED, DELETED, CONFLICT = range(5)
FATES = ("documents", "duplicates", "replaced", "deleted", "rejected")
"""Names of the counts, by fate."""
HEAD = np.dtype(">u8")
PART_COLUMNS = ("doc_id", "source_uri", "source_row", "passage", "tokens", "truncated")

Rows = npt.NDArray[np.int64]


@dataclass
class Resolution:
    """Rows of part files that do not count, by file name, and what became of documents.

    ``counts``: documents by fate, and passages, tokens and so on of the masked rows, negative.
    """

    masked: dict[str, Rows] = field(default_factory=dict)
    conflicts: list[RejectedRow] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


def resolve(storage: Storage, generations: Sequence[Sequence[Record]], deletes: Keys, *, appended: bool) -> Resolution:
    """Decide for every document whose id is deleted or occurs more than once.

    ``generations``: ingest records, oldest first; ``deletes``: sorted keys of deleted ids, (n,) S16. Reads one number per
    document, and whole rows only of those concerned.
    """
    records = [record for generation in generations for record in generation]
    concerned = _concerned(storage, records, deletes)
    if not concerned:
        return Resolution()
    ages = np.array([age for age, generation in enumerate(generations) for _ in generation])
    rows, unit = _read(storage, records, ages, concerned)
    fates = rows.fates(deletes, appended=appended)
    found = Resolution(counts={name: int((fates == fate).sum()) for fate, name in enumerate(FATES) if fate})
    found.counts["documents"] = -int((fates != KEPT).sum())
    for number, record in enumerate(records):
        mine = np.flatnonzero((unit == number) & (fates != KEPT))
        if len(mine):
            places = {(str(rows.file[row]), int(rows.row[row])): int(fates[row]) for row in mine}
            _mask(storage, record, places, found)
    return found


@dataclass(frozen=True)
class Occurrences:
    """Rows of documents, (n,) each: key of the id, key of the text, age of its files, file and row. ``file``: orders by URI."""

    document: Keys
    text: Keys
    age: Rows
    file: npt.NDArray[Any]
    row: Rows

    def fates(self, deletes: Keys, *, appended: bool) -> Rows:
        """What becomes of each row: KEPT, DUPLICATE and so on."""
        order = np.lexsort((self.row, self.file, self.age, self.document))
        document, text = self.document[order], self.text[order]
        starts = np.flatnonzero(np.r_[True, document[1:] != document[:-1]]) if len(order) else np.empty(0, dtype=np.int64)
        lengths = np.diff(np.r_[starts, len(order)])
        fates = np.full(len(order), KEPT)
        for start, length in zip(starts[lengths > 1].tolist(), lengths[lengths > 1].tolist(), strict=True):
            end, first = start + length, start
            if appended:  # the rows of the last file win
                mine, last = order[start:end], order[end - 1]
                older = int(((self.age[mine] != self.age[last]) | (self.file[mine] != self.file[last])).sum())
                first = start + older
                fates[start:first] = np.where(text[start:first] == text[end - 1], DUPLICATE, REPLACED)
            same = (text[first:end] == text[first]).all()
            fates[first:end] = DUPLICATE if same else CONFLICT
            fates[first] = KEPT if same else CONFLICT
        fates[is_among(document, deletes)] = DELETED
        found = np.empty_like(fates)
        found[order] = fates
        return found


def _read(storage: Storage, records: Sequence[Record], ages: Rows, concerned: Mapping[int, Rows]) -> tuple[Occurrences, Rows]:
    """The rows concerned, and the number of the record that each is of."""
    tables, units = [], []
    for number, rows in concerned.items():
        table = read_columns(storage, layout.PASSAGES, documents_file(records[number]), DOCUMENT_SCHEMA.names)
        tables.append(table.take(pa.array(rows)))
        units.append(np.full(len(rows), number))
    table, unit = pa.concat_tables(tables), np.concatenate(units)
    document, text = (keys_of(table.column(name)) for name in ("document", "text"))
    uris = np.array(table.column("source_uri").to_pylist())
    return Occurrences(document, text, ages[unit], uris, table.column("source_row").to_numpy()), unit


def documents_file(record: Record) -> DataFile:
    """The file that tells who the documents of an ingest unit are."""
    if record.documents is None:
        raise ValueError(f"{record.unit}: not the record of an ingest unit")
    return record.documents


def deleted_keys(doc_ids: Iterable[str]) -> Keys:
    """Sorted keys of ids, (n,) S16."""
    return np.unique(np.array([passage_key(doc_id) for doc_id in doc_ids], dtype=KEY_DTYPE))


def _concerned(storage: Storage, records: Sequence[Record], deletes: Keys) -> dict[int, Rows]:
    """Rows of each record's documents whose id is deleted or, going by its first 8 bytes, occurs again somewhere."""
    heads = [_heads(read_columns(storage, layout.PASSAGES, documents_file(record), ["document"])) for record in records]
    ordered = np.sort(np.concatenate([*heads, np.empty(0, dtype=np.uint64)]))
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    wanted = np.union1d(again, deletes.view(HEAD)[::2].astype(np.uint64) if len(deletes) else np.empty(0, dtype=np.uint64))
    found = {}
    for number, mine in enumerate(heads):
        rows = np.flatnonzero(np.isin(mine, wanted)) if len(wanted) else np.empty(0, dtype=np.int64)
        if len(rows):
            found[number] = rows
    return found


def _heads(table: Any) -> npt.NDArray[np.uint64]:
    keys = keys_of(table.column("document"))
    return cast(npt.NDArray[np.uint64], np.ascontiguousarray(keys).view(HEAD)[::2].astype(np.uint64))


def _mask(storage: Storage, record: Record, fates: Mapping[tuple[str, int], int], found: Resolution) -> None:
    """Find the passages of these documents, (uri, row) -> fate, in the parts of their unit."""
    for file in record.files:
        table = read_columns(storage, layout.PASSAGES, file, PART_COLUMNS)
        places = zip(table.column("source_uri").to_pylist(), table.column("source_row").to_pylist(), strict=True)
        rows = [row for row, place in enumerate(places) if place in fates]
        if not rows:
            continue
        found.masked[file.name] = np.array(rows)
        chosen = table.take(pa.array(rows))
        count_passages(found.counts, chosen)
        conflicts = [
            row
            for row, each in zip(rows, chosen.to_pylist(), strict=True)
            if each["passage"] == 0 and fates[each["source_uri"], each["source_row"]] == CONFLICT
        ]
        if conflicts:
            texts = read_columns(storage, layout.PASSAGES, file, ["doc_id", "source_uri", "source_row", "text"])
            found.conflicts += [_conflict(each) for each in texts.take(pa.array(conflicts)).to_pylist()]


def count_passages(counts: dict[str, int], masked: Any) -> None:
    """Take the masked passages off the counts of a snapshot."""
    numbers = masked.column("passage").to_numpy()
    gone = {
        "passages": len(numbers),
        "tokens": int(masked.column("tokens").to_numpy().sum()),
        "split": int((numbers == 1).sum()),
        "truncated": int(np.array(masked.column("truncated").to_pylist(), dtype=bool).sum()),
    }
    for name, count in gone.items():
        counts[name] = counts.get(name, 0) - count


def _conflict(row: Mapping[str, Any]) -> RejectedRow:
    message = f"id {row['doc_id'][:80]!r} stands for several texts; give every document an id of its own"
    document = SourceDocument(row["doc_id"], row["text"], None, row["source_uri"], row["source_row"])
    return rejected_document(document, "E_DUP_ID", message)
