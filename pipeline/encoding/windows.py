"""Long texts cut in the model's own token space.

Windows start and end at words where there are words, leave room for prompt and special tokens, and are tokenized again to
prove that they fit. Knows no config: an encoder whose vector of a long text is the mean of its windows cuts them too.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.encoding.batching import Lengths, Tokens
from pipeline.encoding.model import EncoderSpec
from pipeline.encoding.tokenizer import TextTokenizer
from pipeline.errors import ConfigError

SEGMENT_CHARS = 1 << 16
"""Longer texts are tokenized in segments of about this size, so that memory does not follow the document."""
WHITE_SPACE = re.compile(r"\s")
MIN_ROOM = 8
DEFAULT_OVERLAP = 32
Windowed = Sequence[int] | npt.NDArray[np.int32]
"""(n,): how many rows of tokens each text has."""


Spans = npt.NDArray[np.int32]
"""(n, 3): for each passage the row of tokens that it is part of, its first token there, and the one after its last."""


@dataclass(frozen=True)
class Window:
    """Characters ``start`` to ``end`` of a text. ``tokens``: with prompt and special ones; ``truncated``: it has more."""

    start: int
    end: int
    tokens: int
    truncated: bool


class Windows:
    """Cuts texts that come after ``prompt`` into windows of at most ``tokens`` tokens, prompt and special ones included.

    ``frame_tokens``: of prompt and special ones.

    ``overlap``: tokens that neighbours share; None: 32, at most a quarter of a window.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt: str, tokens: int, overlap: int | None) -> None:
        """Raises ConfigError where there is no room for a text, or none but for the overlap."""
        self.limit = tokens
        self._tokenizer = tokenizer
        self._prompt = prompt
        prompt_tokens = max(0, tokenizer.prompt_tokens(prompt) - (tokenizer.special_tokens + 1) // 2)
        self.frame_tokens = tokenizer.special_tokens + prompt_tokens
        self._room = tokens - self.frame_tokens
        if self._room < MIN_ROOM:
            limit = "passages.tokens" if tokens < tokenizer.max_tokens else "encoder.max_tokens"
            raise ConfigError(f"encoder.document_prompt: leaves {self._room} tokens for the text; shorten it or raise {limit}")
        self._overlap = min(DEFAULT_OVERLAP, self._room // 4) if overlap is None else overlap
        if self._overlap > self._room // 2:
            raise ConfigError(
                f"passages.overlap: {self._overlap} is over half of the {self._room} tokens of a window; lower it"
            )

    def __call__(self, text: str) -> list[Window]:
        """The windows of a text, in order; none of white space."""
        spans = self._token_spans(text)
        gaps = [start - end for (_, end), (start, _) in pairwise(spans)]
        starts = _Starts(words=[True, *(gap > 0 for gap in gaps)], characters=[True, *(gap >= 0 for gap in gaps)])
        windows: list[Window] = []
        first = 0
        while first < len(spans):
            end, window = self._window(text, spans, starts, first)
            windows.append(window)
            if end == len(spans):
                break
            again = _previous(starts.words, end - self._overlap, floor=first + 1) if self._overlap else end
            first = max(first + 1, again)
        return windows

    def tokens(self, texts: Sequence[str]) -> tuple[list[Tokens], list[int]]:
        """Token ids of the windows of all texts, one after the other, and how many each text has: one where it fits."""
        counts = self._tokenizer.count([self._prompt + text for text in texts])
        pieces: list[str] = []
        numbers: list[int] = []
        for text, count in zip(texts, counts, strict=True):
            windows = self(text) if count > self.limit else []
            own = [text[window.start : window.end] for window in windows] or [text]
            pieces += own
            numbers.append(len(own))
        return list(self._tokenizer([self._prompt + piece for piece in pieces])), numbers

    def _window(self, text: str, spans: list[tuple[int, int]], starts: "_Starts", first: int) -> tuple[int, Window]:
        """The longest window from token ``first`` that fits when tokenized again, and the token after it."""
        size = self._room
        while True:
            end = min(first + size, len(spans))
            if end < len(spans):
                end = _previous(starts.words, end, floor=first + size // 2)
                end = _previous(starts.characters, end, floor=first)
            start_char, end_char = spans[first][0], spans[end - 1][1]
            count = self._tokenizer.count([self._prompt + text[start_char:end_char]])[0]
            if count <= self.limit or size == 1:
                return end, Window(start_char, end_char, min(count, self.limit), count > self.limit)
            size = max(1, size - (count - self.limit))

    def _token_spans(self, text: str) -> list[tuple[int, int]]:
        """Character span of every token of a text of any length; white space at either side left out."""
        spans: list[tuple[int, int]] = []
        for begin, finish in _segments(text):
            for start, end in self._tokenizer.offsets(text[begin:finish]):
                if piece := text[begin + start : begin + end].rstrip():
                    spans.append((begin + start, begin + start + len(piece)))
        return spans


def context_tokens(
    tokenizer: TextTokenizer, prompt: str, pieces: Sequence[tuple[bool, str]]
) -> tuple[list[int], list[int]] | None:
    """Token ids of the passages of a context as one text, and where each begins; the last one ends them.

    Each comes with whether there is a space before it. The first has prompt and leading special tokens too, the last one the
    trailing ones. None where they are more than the model takes.
    """
    text, begins = prompt, []
    for space, piece in pieces:
        text += " " * space
        begins.append(len(text))
        text += piece
    ids, starts = tokenizer([text])[0], [start for start, _ in tokenizer.offsets(text)]
    if len(starts) + tokenizer.special_tokens > tokenizer.max_tokens:
        return None
    borders = len(tokenizer.frame[0]) + np.searchsorted(starts, begins)
    return ids, [0, *borders[1:].tolist()]


def by_row(spans: Spans, lengths: Lengths) -> tuple[npt.NDArray[np.int64], dict[int, list[tuple[int, int]]]]:
    """The order of spans by row, the longest rows first, and what is wanted of each row in that order."""
    order = np.lexsort((spans[:, 1], spans[:, 0], -lengths[spans[:, 0]]))
    own: dict[int, list[tuple[int, int]]] = {}
    for row, start, end in spans[order].tolist():
        own.setdefault(row, []).append((start, end))
    return order, own


def document_tokens(tokenizer: TextTokenizer, spec: EncoderSpec, texts: Sequence[str]) -> tuple[list[Tokens], list[int]]:
    """Token ids of documents as an encoder wants them, and how many rows of them each has: one but for ``spec.window``."""
    if spec.window is None:
        return list(tokenizer([spec.document_prompt + text for text in texts])), [1] * len(texts)
    return Windows(tokenizer, spec.document_prompt, spec.window, spec.overlap).tokens(texts)


class _Starts(NamedTuple):
    """For each token of a text whether a word begins with it, and whether a character does: some are of several tokens."""

    words: list[bool]
    characters: list[bool]


def _previous(starts: list[bool], token: int, *, floor: int) -> int:
    """The last token at or before ``token`` that starts something; ``token`` itself if there is none above ``floor``."""
    return next((number for number in range(token, floor, -1) if starts[number]), token)


def _segments(text: str) -> list[tuple[int, int]]:
    if len(text) <= SEGMENT_CHARS:
        return [(0, len(text))]
    cuts = [0]
    while len(text) - cuts[-1] > SEGMENT_CHARS:
        gap = WHITE_SPACE.search(text, cuts[-1] + SEGMENT_CHARS, cuts[-1] + 2 * SEGMENT_CHARS)
        cuts.append(gap.start() if gap else min(len(text), cuts[-1] + 2 * SEGMENT_CHARS))
    if cuts[-1] == len(text):
        cuts.pop()
    return list(zip(cuts, [*cuts[1:], len(text)], strict=True))
