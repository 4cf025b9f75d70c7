"""BM25 over the texts of an artifact: the only bm25s door. Written in two passes in bounded memory, searched memory-mapped.

Scores are Lucene's (Robertson's with the idf that is never negative; k1 and b are Lucene's defaults), computed when the index
is written, as BM25S does (Lù, 2024), in its files: ``bm25s.BM25.load(folder / "bm25", mmap=True, load_vocab=False)`` opens
them too. The vocabulary is a sorted column in a mapped file: as a dict of strings it would be most of the index's memory.
"""

import json
import os
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.ann.recall import Matrix, Ordinals
from pipeline.config_what import IndexConfig
from pipeline.errors import ConfigError, VerificationError

FOLDER = "bm25"
NAMES = ("data.csc.index.npy", "indices.csc.index.npy", "indptr.csc.index.npy", "terms.arrow", "params.index.json")
K1, B = 1.2, 0.75
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W_]+")
"""A word; in scripts without spaces between words a character."""
BLOCK_ENTRIES = 1 << 18
MAX_REMEMBERED_WORDS = 1 << 20

Mask = npt.NDArray[np.bool_]


def check_language(request: IndexConfig) -> None:
    """Tell an unknown language before hours of encoding: ConfigError."""
    if request.lexical:
        Analyzer(request.language)


class Analyzer:
    """A text -> its terms: lower case, no stop words, stemmed (Snowball). ``language``: English name of one, or none.

    Raises ConfigError for a language that Snowball has no stemmer for.
    """

    def __init__(self, language: str) -> None:
        import Stemmer
        from bm25s.tokenization import _infer_stopwords

        if language != "none" and language not in Stemmer.algorithms():
            known = ", ".join(name for name in Stemmer.algorithms() if name != "porter")
            raise ConfigError(f"index.language: {language} is not known; take none, or one of {known}")
        self._stem = Stemmer.Stemmer(language).stemWord if language != "none" else str
        try:
            stopped = _infer_stopwords(language if language != "none" else None)
        except ValueError:  # a language that bm25s has no list for
            stopped = ()
        self._stopped = dict.fromkeys(stopped, "")
        self._terms = self._stopped.copy()

    def __call__(self, text: str) -> list[str]:
        """The terms of a text, in order, repeated as they are."""
        terms = []
        for word in WORD.findall(text.lower()):
            term = self._terms.get(word)
            if term is None:
                if len(self._terms) >= MAX_REMEMBERED_WORDS:
                    self._terms = self._stopped.copy()
                self._terms[word] = term = self._stem(word)
            if term:
                terms.append(term)
        return terms


def write_lexical(texts: Iterable[Sequence[str]], language: str, folder: Path) -> list[str]:
    """Write the index of texts in ordinal order, given some at a time; returns the names of its files.

    Memory: the vocabulary, about 100 bytes a term, and a block; postings lie in a scratch file and in mapped ones.
    """
    target = folder / FOLDER
    target.mkdir()
    analyzer, vocabulary = Analyzer(language), {}  # type: Analyzer, dict[str, int]
    lengths: list[npt.NDArray[np.int64]] = []
    rows = 0
    frequencies = np.zeros(1 << 16, dtype=np.int64)
    with (target / "postings").open("wb") as out:
        for block in texts:
            counted, words = _counted(block, analyzer, vocabulary)
            if len(vocabulary) > len(frequencies):
                frequencies = np.concatenate([frequencies, np.zeros(len(vocabulary), dtype=np.int64)])
            np.add.at(frequencies, counted["term"], 1)
            counted["row"] += rows
            rows += len(words)
            lengths.append(words)
            counted.tofile(out)
    every = np.concatenate(lengths) if lengths else np.empty(0, dtype=np.int64)
    terms = sorted(vocabulary)
    by_term = np.fromiter((vocabulary[term] for term in terms), dtype=np.int64, count=len(terms))
    _write_scores(target, frequencies[by_term], np.argsort(by_term), every)
    (target / "postings").unlink()
    batch = pa.record_batch({"term": pa.array(terms, pa.large_string())})
    with pa.ipc.new_file(target / NAMES[3], batch.schema) as out:
        out.write_batch(batch)
    settings = {"k1": K1, "b": B, "method": "lucene", "idf_method": "lucene", "dtype": "float32", "int_dtype": "int32"}
    (target / NAMES[4]).write_text(json.dumps(settings | {"num_docs": len(every), "backend": "numpy"}))
    return [f"{FOLDER}/{name}" for name in NAMES]


class Lexical:
    """The index of a local artifact folder; its files' hashes have been checked by the caller. Safe in several threads.

    ``count``: texts of the artifact. ``within``: only these ordinals are looked at; default: all.
    """

    def __init__(self, folder: Path, language: str, count: int, within: range | None = None) -> None:
        from bm25s import BM25

        try:
            index: Any = BM25.load(folder / FOLDER, mmap=True, load_vocab=False)
            terms = pa.ipc.open_file(pa.memory_map(str(folder / FOLDER / NAMES[3])).read_buffer()).get_batch(0)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise VerificationError(
                f"{folder / FOLDER}: not readable by bm25s, {error}; restore or rebuild the artifact"
            ) from error
        if index.scores["num_docs"] != count:
            raise VerificationError(
                f"{folder / FOLDER}: {index.scores['num_docs']} texts, the manifest says {count}; rebuild the artifact"
            )
        self._terms = terms.column("term")
        self._scores, self._rows, self._starts = (np.asarray(index.scores[name]) for name in ("data", "indices", "indptr"))
        self._within = range(count) if within is None else within
        self._analyzer = Analyzer(language)

    def search(self, queries: Sequence[str], k: int, allowed: Mask | None = None) -> tuple[Matrix, Ordinals]:
        """Scores and ordinals of the k best texts that share a term with each query, (q, k), -1 padded.

        ``allowed``: (n,) by ordinal, what may be found.
        """
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        ordinals = np.full((len(queries), k), -1, dtype=np.int64)
        for row, query in enumerate(queries):
            terms = [number for term in self._analyzer(query) if (number := self._number_of(term)) is not None]
            if not terms:
                continue
            found = self._scored(terms)
            rows = np.flatnonzero(found if allowed is None else found * allowed[self._within.start : self._within.stop])
            best = _best(found, rows, k)
            scores[row, : len(best)], ordinals[row, : len(best)] = found[best], best + self._within.start
        return scores, ordinals

    def _number_of(self, term: str) -> int | None:
        number = bisect_left(range(len(self._terms)), term, key=lambda place: self._terms[place].as_py())
        return number if number < len(self._terms) and self._terms[number].as_py() == term else None

    def _scored(self, terms: Sequence[int]) -> npt.NDArray[np.float32]:
        """Sums of the scores of terms, for each ordinal looked at. Postings of a term are in the order of ordinals."""
        start = self._within.start
        found = np.zeros(len(self._within), dtype=np.float32)
        bounds = np.array([start, self._within.stop], dtype=self._rows.dtype)  # of another type, all rows would be converted
        for term in terms:
            first, end = self._starts[term], self._starts[term + 1]
            first, end = first + np.searchsorted(self._rows[first:end], bounds)
            rows = self._rows[first:end]
            np.add.at(found, rows - start if start else rows, self._scores[first:end])
        return found


def _best(scores: npt.NDArray[np.float32], rows: npt.NDArray[np.int64], k: int) -> npt.NDArray[np.int64]:
    """The k best of some rows, best first, equal ones by row: BM25 gives many texts the same score."""
    if len(rows) > k:
        limit = np.partition(scores[rows], len(rows) - k)[len(rows) - k]
        rows = rows[scores[rows] >= limit]
    return rows[np.lexsort((rows, -scores[rows]))[:k]]


def _counted(texts: Sequence[str], analyzer: Analyzer, vocabulary: dict[str, int]) -> tuple[Any, npt.NDArray[np.int64]]:
    """How often each term is in each text, as rows (row, term, times), and the number of terms of each text."""
    terms = [[vocabulary.setdefault(term, len(vocabulary)) for term in analyzer(text)] for text in texts]
    words = np.array([len(each) for each in terms], dtype=np.int64)
    flat = np.fromiter((term for each in terms for term in each), dtype=np.int64, count=int(words.sum()))
    pairs, times = np.unique(np.repeat(np.arange(len(texts)), words) << 32 | flat, return_counts=True)
    counted = np.empty(len(pairs), dtype=_POSTING)
    counted["row"], counted["term"], counted["times"] = pairs >> 32, pairs & 0xFFFFFFFF, times
    return counted, words


_POSTING = np.dtype([("row", "<i4"), ("term", "<i4"), ("times", "<i4")])


def _write_scores(
    target: Path, frequencies: npt.NDArray[np.int64], numbers: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> None:
    """Sort postings by term, rows ascending, and score them: a counting sort from file to mapped files.

    ``numbers``: of each term as in the postings, its place among the sorted terms, which ``frequencies`` are of.
    """
    from bm25s.scoring import _select_idf_scorer, _select_tfc_scorer

    entries = int(frequencies.sum())
    starts = np.concatenate([[0], np.cumsum(frequencies)])
    np.save(target / NAMES[2], starts)
    data = _create(target / NAMES[0], np.float32, entries)
    rows = _create(target / NAMES[1], np.int32, entries)
    rarity_of, frequency_of = _select_idf_scorer("lucene"), _select_tfc_scorer("lucene")
    idf = np.array([rarity_of(int(number), N=len(lengths)) for number in frequencies], dtype=np.float32)
    average = float(lengths.mean()) if len(lengths) else 0.0
    for unsorted in _blocks(target / "postings"):
        unsorted["term"] = numbers[unsorted["term"]]
        block = unsorted[np.argsort(unsorted["term"], kind="stable")]
        terms, first, counts = np.unique(block["term"], return_index=True, return_counts=True)
        places = np.repeat(starts[terms] - first, counts) + np.arange(len(block))
        starts[terms] += counts
        weights = frequency_of(block["times"], lengths[block["row"]], average, K1, B)
        data[places], rows[places] = idf[block["term"]] * weights, block["row"]


def _blocks(file: Path) -> Iterator[Any]:
    with file.open("rb") as postings:
        while len(block := np.fromfile(postings, dtype=_POSTING, count=BLOCK_ENTRIES)):
            yield block


def _create(file: Path, dtype: Any, count: int) -> Any:
    """A mapped .npy file that has its room on the disk, where it can be had; none is made of an empty one. Raises OSError."""
    if not count:
        np.save(file, np.empty(0, dtype=dtype))
        return np.empty(0, dtype=dtype)
    mapped = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=(count,))
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with file.open("rb+") as handle:
            os.posix_fallocate(handle.fileno(), 0, file.stat().st_size)  # else a full disk would be a SIGBUS
    return cast(Any, mapped)
