"""A range of an artifact's ordinals: what a search asks of it, how an artifact is cut into such, and one that lies here.

A search asks every partition and makes one ranking of the answers, so it does not matter where they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from pipeline.ann.collection import open_collection
from pipeline.ann.recall import Matrix, Ordinals
from pipeline.ann.vectors import gather
from pipeline.errors import ConfigError
from pipeline.root.manifest import IndexPart, Merged
from pipeline.search.document_files import Documents
from pipeline.search.filters import METADATA, AnyFilter, Metadata, Passing, parse_filter
from pipeline.search.lexical import Lexical

FILTERS_KEPT = 8
"""What passes a filter is found once for so many filters: a search asks several times with the same one."""

Row = dict[str, Any]
AnyMerged = TypeVar("AnyMerged", bound=Merged)


@dataclass(frozen=True)
class Depth:
    """How deep a dense ranking goes: ``passages`` of it, ``lists`` visited, ``rescoring`` candidates for each scored again.

    ``exact``: by brute force over the stored vectors instead.
    """

    passages: int
    lists: int = 0
    rescoring: int = 0
    exact: bool = False


@dataclass(frozen=True)
class Found:
    """Rankings of q queries: scores and ordinals, (q, width), best first, -1 padded. ``is_all``: (q,), there are no more."""

    scores: Matrix
    ordinals: Ordinals
    is_all: npt.NDArray[np.bool_]


class Partition(Protocol):
    """What is asked of a range of ordinals; no answer holds others. Every question stands alone, so it may be asked again."""

    @property
    def ordinals(self) -> range:
        """What it holds."""

    def dense(self, vectors: Matrix, depth: Depth, wanted: AnyFilter | None) -> Found:
        """The nearest passages of (q, dim) unit vectors; ConfigError for a filter that cannot be asked for."""

    def lexical(self, texts: Sequence[str], passages: int, wanted: AnyFilter | None) -> Found:
        """The best passages by BM25, by the term weights of the whole artifact."""

    def rows(self, ordinals: Ordinals, wanted: AnyFilter | None) -> dict[int, list[Row]]:
        """The documents that have these ordinals and pass the filter, by doc_id."""

    def vector_of(self, doc_id: str, passage: int) -> Matrix | None:
        """The stored vector of a document's passage, (1, dim); None where it is not in this range."""


class LocalPartition:
    """Opens the data files of a local artifact folder; hashes nothing (``artifact.verify`` does).

    ``merged``: an artifact, or a share of it.
    """

    def __init__(self, folder: Path, merged: Merged) -> None:
        self.collection = open_collection(folder, merged)
        self.documents = Documents(folder, merged.documents)
        self.ordinals = self.collection.index.ordinals
        count = len(self.collection.vectors)
        self._words = Lexical(folder, merged.lexical, count, self.ordinals) if merged.lexical else None
        metadata = Metadata(folder / METADATA, merged.columns) if merged.columns else None
        found = partial(_passing, metadata, count, self.ordinals)  # not a method: a cycle would keep the files open
        self._filtered = lru_cache(maxsize=FILTERS_KEPT)(found)

    def dense(self, vectors: Matrix, depth: Depth, wanted: AnyFilter | None) -> Found:
        """See Partition."""
        passing = self._passing(wanted)
        allowed, available = (passing.ordinals, passing.count) if passing else (None, len(self.ordinals))
        if depth.exact:
            found = self.collection.exact(vectors, depth.passages, allowed)
        else:
            found = self.collection.search(
                vectors, depth.passages, nprobe=depth.lists, rescoring=depth.rescoring, allowed=allowed
            )
        return _found(*found, available, is_whole=depth.exact or depth.lists >= self.collection.index.lists)

    def lexical(self, texts: Sequence[str], passages: int, wanted: AnyFilter | None) -> Found:
        """See Partition."""
        if self._words is None:
            raise ConfigError("mode: the artifact has no lexical index; set index.lexical: true and run vecmill reindex")
        passing = self._passing(wanted)
        found = self._words.search(texts, passages, passing.ordinals if passing else None)
        return _found(*found, len(self.ordinals), is_whole=True)

    def rows(self, ordinals: Ordinals, wanted: AnyFilter | None) -> dict[int, list[Row]]:
        """See Partition."""
        rows, passing = self.documents.rows(ordinals), self._passing(wanted)
        if passing is None:
            return rows
        return {
            ordinal: [row for row, passes in zip(found, passing.documents(ordinal), strict=True) if passes]
            for ordinal, found in rows.items()
        }

    def vector_of(self, doc_id: str, passage: int) -> Matrix | None:
        """See Partition. Reads the ids of all documents."""
        ordinal = self.documents.passages_of(doc_id).get(passage)
        return None if ordinal not in self.ordinals else gather(self.collection.vectors, np.array([ordinal]))

    def _passing(self, wanted: AnyFilter | None) -> Passing | None:
        return None if wanted is None else self._filtered(wanted.model_dump_json())


def _passing(metadata: Metadata | None, count: int, within: range, wanted: str) -> Passing:
    if metadata is None:
        raise ConfigError("filter: the artifact has no metadata; name columns in corpus.metadata and run vecmill reindex")
    return metadata.passing(parse_filter(wanted), count, within)


def _found(scores: Matrix, ordinals: Ordinals, available: int, *, is_whole: bool) -> Found:
    """``available``: so many passages can be found. ``is_whole``: where a ranking is padded, nothing more can be."""
    counts = np.count_nonzero(ordinals >= 0, axis=1)
    return Found(scores, ordinals, (counts >= available) | (is_whole & (counts < ordinals.shape[1])))


def best_of(found: Sequence[Found], passages: int) -> Found:
    """One ranking of the answers of several partitions, ties by ordinal, so long as one partition's would be."""
    if len(found) == 1:
        return found[0]
    ordinals = np.concatenate([each.ordinals for each in found], axis=1)
    scores = np.where(ordinals < 0, -np.inf, np.concatenate([each.scores for each in found], axis=1))
    order = np.lexsort((ordinals, -scores), axis=1)[:, :passages]
    is_all = np.all([each.is_all for each in found], axis=0) & (np.count_nonzero(ordinals >= 0, axis=1) <= passages)
    return Found(np.take_along_axis(scores, order, 1), np.take_along_axis(ordinals, order, 1), is_all)


def share_of(merged: AnyMerged, number: int, count: int) -> AnyMerged:
    """What partition ``number`` of ``count`` has of an artifact: its index files, and files with documents of their ordinals.

    Vectors, of which it needs its ordinals' rows, BM25 and metadata are whole files, that each has. Raises ConfigError where
    there are fewer index files than partitions.
    """
    parts, last = merged.parts, merged.parts[-1]
    if len(parts) < count:
        raise ConfigError(
            f"artifact {merged.version}: {len(parts)} index files cannot be served in {count} partitions; "
            f"set index.partitions: {count} and run vecmill reindex, or serve fewer"
        )
    mine = parts[len(parts) * number // count : len(parts) * (number + 1) // count]
    held = ordinals_of(mine)
    ends = [*(file.first for file in merged.documents[1:]), last.first + last.count]
    documents = [file for file, end in zip(merged.documents, ends, strict=True) if file.first < held.stop and end > held.start]
    left_out = {part.name for part in parts if part not in mine} | {
        file.name for file in merged.documents if file not in documents
    }
    files = {name: file for name, file in merged.files.items() if name not in left_out}
    return merged.model_copy(update={"parts": mine, "documents": tuple(documents), "files": files})


def ordinals_of(parts: Sequence[IndexPart]) -> range:
    """The ordinals of index files that follow each other."""
    return range(parts[0].first, parts[-1].first + parts[-1].count)
