"""Documents -> passages: the texts that are encoded, each under the hash of itself.

A document over the model's limit is split in the model's own token space. Windows start and end at words
where there are words, leave room for prompt and special tokens, and are tokenized again to prove that they
fit. Spans are character offsets in the normalised document.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config import PassagesConfig
from pipeline.errors import ConfigError
from pipeline.tokenizer import TextTokenizer

KEY_BYTES = 16
SEGMENT_CHARS = 1 << 16
"""Longer texts are tokenized in segments of about this size, so that memory does not follow the document."""
WHITE_SPACE = re.compile(r"\s")
MIN_ROOM = 8
DEFAULT_OVERLAP = 32


@dataclass(frozen=True)
class Passage:
    """One text to encode. ``tokens`` counts prompt and special tokens; ``truncated``: the encoder sees only its beginning."""

    key: bytes
    start: int
    end: int
    text: str
    tokens: int
    truncated: bool = False


def passage_key(text: str) -> bytes:
    """BLAKE2b-128 of the passage text, before the prompt: 16 bytes."""
    return hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).digest()


class Splitter:
    """Cuts documents into passages that fit the encoder."""

    def __init__(self, tokenizer: TextTokenizer, passages: PassagesConfig, document_prompt: str) -> None:
        self._tokenizer = tokenizer
        self._prompt = document_prompt
        self.prompt = document_prompt.strip()
        self._long = passages.long
        prompt_tokens = max(0, tokenizer.prompt_tokens(document_prompt) - (tokenizer.special_tokens + 1) // 2)
        self._room = tokenizer.max_tokens - tokenizer.special_tokens - prompt_tokens
        if self._room < MIN_ROOM:
            raise ConfigError(
                f"encoder.document_prompt: leaves {self._room} tokens for the text; shorten it or raise encoder.max_tokens"
            )
        self._overlap = min(DEFAULT_OVERLAP, self._room // 4) if passages.overlap is None else passages.overlap
        if self._long == "split" and self._overlap > self._room // 2:
            raise ConfigError(
                f"passages.overlap: {self._overlap} is over half of the {self._room} tokens of a window; lower it"
            )

    def __call__(self, texts: Sequence[str], known: Mapping[bytes, int] | None = None) -> list[list[Passage]]:
        """The passages of each text, in order; at least one. ``known``: tokens of whole passages by key, counted before."""
        keys = [passage_key(text) for text in texts]
        counts = {key: known[key] for key in keys if key in known} if known else {}
        fresh = {key: self._prompt + text for key, text in zip(keys, texts, strict=True) if key not in counts}
        counts |= zip(fresh, self._tokenizer.count(list(fresh.values())), strict=True)
        return [self._passages(text, key, counts[key]) for text, key in zip(texts, keys, strict=True)]

    def _passages(self, text: str, key: bytes, count: int) -> list[Passage]:
        limit = self._tokenizer.max_tokens
        if count <= limit:
            return [Passage(key, 0, len(text), text, count)]
        if self._long == "truncate":
            return [Passage(key, 0, len(text), text, limit, truncated=True)]
        return self._windows(text)

    def _windows(self, text: str) -> list[Passage]:
        spans = self._token_spans(text)
        is_word_start = [number == 0 or spans[number - 1][1] < start for number, (start, _) in enumerate(spans)]
        windows: list[Passage] = []
        first = 0
        while first < len(spans):
            end, passage = self._window(text, spans, is_word_start, first)
            windows.append(passage)
            if end == len(spans):
                break
            first = max(first + 1, _previous_word(is_word_start, end - self._overlap, floor=first + 1))
        return windows

    def _window(self, text: str, spans: list[tuple[int, int]], is_word_start: list[bool], first: int) -> tuple[int, Passage]:
        """The longest window from token ``first`` that fits when tokenized again, and the token after it."""
        size = self._room
        while True:
            end = min(first + size, len(spans))
            if end < len(spans):
                end = _previous_word(is_word_start, end, floor=first + size // 2)
            start_char, end_char = spans[first][0], spans[end - 1][1]
            window = text[start_char:end_char]
            count = self._tokenizer.count([self._prompt + window])[0]
            if count <= self._tokenizer.max_tokens or size == 1:
                truncated = count > self._tokenizer.max_tokens
                tokens = min(count, self._tokenizer.max_tokens)
                return end, Passage(passage_key(window), start_char, end_char, window, tokens, truncated)
            size = max(1, size - (count - self._tokenizer.max_tokens))

    def _token_spans(self, text: str) -> list[tuple[int, int]]:
        """Character span of every token of a text of any length; white space at either side left out."""
        spans: list[tuple[int, int]] = []
        for begin, finish in _segments(text):
            for start, end in self._tokenizer.offsets(text[begin:finish]):
                piece = text[begin + start : begin + end]
                left = len(piece) - len(piece.lstrip())
                if piece.strip():
                    spans.append((begin + start + left, begin + end - (len(piece) - len(piece.rstrip()))))
        return spans


def _previous_word(is_word_start: list[bool], token: int, *, floor: int) -> int:
    """The last token at or before ``token`` that starts a word; ``token`` itself if there is none above ``floor``."""
    return next((number for number in range(token, floor, -1) if is_word_start[number]), token)


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
