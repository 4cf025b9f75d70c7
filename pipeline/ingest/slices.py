"""A piece of an input file: which one, which columns of it matter, opened and found unchanged."""

import contextlib
import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from pydantic import BaseModel, ConfigDict

from pipeline.config import StoreConfig
from pipeline.config_what import CorpusConfig
from pipeline.errors import BadFileError
from pipeline.ingest.listing import stamp_now
from pipeline.root.storage import file_at

COMPRESSION_ENDINGS = (".gz", ".zst")
BOMB_BYTES, BOMB_RATIO = 1 << 30, 200
"""A file that becomes larger than both, in bytes and times its size, is not text somebody wrote (gzip ends at 1,030 times)."""


class Slice(BaseModel):
    """A file, or a run of row groups of a Parquet file (``first`` included, ``end`` not).

    ``content`` identifies its bytes; ``stamp`` tells cheaply whether they changed since it was listed, empty: unknown.
    """

    model_config = ConfigDict(frozen=True)
    uri: str
    size_bytes: int
    content: str
    stamp: str = ""
    format: str
    first_row_group: int = 0
    end_row_group: int | None = None


class BadRowError(Exception):
    """A row that cannot be read or used: ``code`` for machines, the text for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Columns:
    """Names of the columns that matter; ``base``: the URI that text files are named relative to."""

    id: str
    text: str
    title: str | None
    metadata: tuple[str, ...]
    base: str

    @staticmethod
    def of(file_format: str, corpus: CorpusConfig) -> "Columns":
        """What the config says, else the format's own names."""
        beir = file_format == "beir"
        title = corpus.title if corpus.title or not beir else "title"
        base = re.split(r"[*\[]", corpus.uri, maxsplit=1)[0].rpartition("/")[0] if set("*[") & set(corpus.uri) else corpus.uri
        return Columns(corpus.id or ("_id" if beir else "id"), corpus.text or "text", title, corpus.metadata, base)

    @property
    def names(self) -> list[str]:
        """Each wanted column once."""
        return list(dict.fromkeys([self.id, self.text, *([self.title] if self.title else []), *self.metadata]))


Row = dict[str, Any] | BadRowError
Rows = Iterator[tuple[int, Row]]


def base_name(uri: str) -> str:
    """File name without its compression ending."""
    name = uri.rpartition("/")[2]
    for ending in COMPRESSION_ENDINGS:
        name = name.removesuffix(ending)
    return name


def ending(uri: str) -> str:
    """Lower-case ending of the file name, compression aside; empty if it has none."""
    name = base_name(uri)
    return name[name.rfind(".") :].lower() if "." in name else ""


def require(columns: Columns, found: Sequence[str], uri: str) -> None:
    """Raise BadFileError when a wanted column is missing or there more than once."""
    if twice := [name for name in columns.names if found.count(name) > 1]:
        raise BadFileError(f"{uri}: E_SCHEMA, column {twice[0]!r} is there more than once; rename one")
    for name in columns.names:
        if name not in found:
            close = difflib.get_close_matches(name, found, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "set corpus.id, corpus.text, corpus.title"
            raise BadFileError(f"{uri}: E_SCHEMA, wanted column {name!r}, the file has {', '.join(found)[:300]}; {hint}")


def check_expansion(part: Slice, size: int, compressed: int = 0) -> None:
    """Refuse a file that becomes so much larger in memory that it must be a bomb."""
    compressed = compressed or part.size_bytes
    if size > BOMB_BYTES and size > BOMB_RATIO * compressed:
        found = f"{compressed} bytes become {size} and more; if that is meant, write it in smaller pieces"
        raise BadFileError(f"{part.uri}: E_BOMB, {found}")


@contextlib.contextmanager
def opened(part: Slice, store: StoreConfig) -> Iterator[BinaryIO]:
    """The file of a slice, which must be the one that was listed: looked at when it has been read, or could not be."""
    storage, name = file_at(part.uri, store)
    try:
        with storage.explained("read", name), storage.open(name) as handle:
            yield handle
    except FileNotFoundError as error:
        raise BadFileError(f"{part.uri}: E_INPUT_CHANGED, it is gone since it was listed; run again") from error
    except BadFileError:
        _check_unchanged(part, store)
        raise
    _check_unchanged(part, store)


def _check_unchanged(part: Slice, store: StoreConfig) -> None:
    if part.stamp and stamp_now(part.uri, store) != (part.size_bytes, part.stamp):
        raise BadFileError(f"{part.uri}: E_INPUT_CHANGED, it is not as it was when it was listed; run again")
