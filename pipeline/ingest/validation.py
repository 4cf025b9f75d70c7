"""The preflight: every file and every row of the corpus against its contract, without a model and without writing anything."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from pipeline.config import Config
from pipeline.errors import BadFileError
from pipeline.ingest.corpus import RejectedRow, read_documents, read_ids
from pipeline.ingest.documents import CONFLICT, FATES, Occurrences, deleted_keys
from pipeline.ingest.listing import FileInfo
from pipeline.ingest.passages import passage_key
from pipeline.ingest.slices import Slice
from pipeline.ingest.snapshot import ceiling
from pipeline.ingest.units import deletes_config, find_files
from pipeline.root.manifest import InputFile
from pipeline.root.shards import KEY_DTYPE


@dataclass
class Validation:
    """What there is: rows by what would become of them, problems by code, all rejected rows, files left out.

    ``bad_files`` stop a run unless ``corpus.on_error`` says to skip them.
    """

    files: int
    ignored: tuple[str, ...]
    counts: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    rejected: list[RejectedRow] = field(default_factory=list)
    bad_files: list[str] = field(default_factory=list)
    ceiling: int = 0

    @property
    def ok(self) -> bool:
        """Whether a run would accept it."""
        return not self.bad_files and self.counts["rejected"] <= self.ceiling and self.counts["documents"] > 0


def validate(config: Config, *, each_file: Callable[[int, int], None] = lambda done, total: None) -> Validation:
    """Read the whole corpus as ingest would. Rows of one id are compared across all files."""
    chosen, ignored = find_files(config)
    found = Validation(len(chosen), ignored)
    seen = _Seen()
    for number, (file, kind) in enumerate(chosen):
        try:
            rows = list(_rows(file, kind, config, found, seen, number))
        except BadFileError as error:
            seen.forget(number)
            found.codes[error.code] += 1
            found.counts["skipped_files"] += 1
            if config.corpus.on_error != "skip_file":
                found.bad_files.append(str(error))
        else:
            found.rejected += rows
        each_file(number + 1, len(chosen))
    found.counts["rejected"] = len(found.rejected)
    found.codes.update(row.code for row in found.rejected)
    _resolve(config, [file.uri for file, _ in chosen], found, seen)
    corpus = config.corpus
    found.counts["rows"] = sum(found.counts[name] for name in FATES)
    found.ceiling = 0 if corpus.on_error == "abort" else ceiling(corpus, found.counts["rows"])
    return found


class _Seen:
    """Documents read so far: 16 bytes of id and of text each, with where they are from."""

    def __init__(self) -> None:
        self.document, self.text = bytearray(), bytearray()
        self.file: list[int] = []
        self.row: list[int] = []

    def add(self, doc_id: str, text: str, file: int, row: int) -> None:
        self.document += passage_key(doc_id)
        self.text += passage_key(text)
        self.file.append(file)
        self.row.append(row)

    def forget(self, file: int) -> None:
        """Take back what a file gave before it broke."""
        kept = len(self.file) if file not in self.file else self.file.index(file)
        del (
            self.file[kept:],
            self.row[kept:],
            self.document[kept * KEY_DTYPE.itemsize :],
            self.text[kept * KEY_DTYPE.itemsize :],
        )


def _rows(file: FileInfo, kind: str, config: Config, found: Validation, seen: _Seen, number: int) -> Iterator[RejectedRow]:
    part = Slice(uri=file.uri, size_bytes=file.size_bytes, stamp=file.stamp, content="", format=kind)
    for row in read_documents(part, config.corpus, config.store):
        if isinstance(row, RejectedRow):
            yield row
        else:
            seen.add(row.doc_id, row.text, number, row.source_row)


def _resolve(config: Config, uris: list[str], found: Validation, seen: _Seen) -> None:
    """Count what becomes of rows that share their id or are deleted."""
    corpus = config.corpus
    deleted = deleted_keys(())
    if corpus.deletes:
        files = [
            (InputFile(uri=info.uri, size_bytes=info.size_bytes, stamp=info.stamp, content=""), kind)
            for info, kind in find_files(deletes_config(config))[0]
        ]
        deleted = deleted_keys(read_ids(files, corpus, config.store))
    document, text = (np.frombuffer(bytes(keys), dtype=KEY_DTYPE) for keys in (seen.document, seen.text))
    files_, rows = np.array(seen.file, dtype=np.int64), np.array(seen.row, dtype=np.int64)
    fates = Occurrences(document, text, np.zeros(len(rows), dtype=np.int64), files_, rows).fates(
        deleted, appended=corpus.mode == "append"
    )
    for fate, name in enumerate(FATES):
        found.counts[name] += int((fates == fate).sum())
    for place in np.flatnonzero(fates == CONFLICT):
        uri, row = uris[files_[place]], int(rows[place])
        found.codes["E_DUP_ID"] += 1
        found.rejected.append(RejectedRow(uri, row, None, "E_DUP_ID", "its id stands for several texts", None, None))
