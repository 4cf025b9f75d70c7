"""Documents -> passages: the texts that are encoded, each under the hash of itself.

A document of more tokens than a passage has is split into windows, or cut. Spans are character offsets in the normalised
document.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from pipeline.config_what import PassagesConfig
from pipeline.encoding.tokenizer import TextTokenizer
from pipeline.encoding.windows import Windows
from pipeline.errors import ConfigError
from pipeline.root.shards import KEY_BYTES

CONTEXT_BYTES, TEXT_BYTES = 10, 4
"""Of a key: at its beginning what its passage is read in, which one that is read alone shares with none; at its end what its
text alone decides."""


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


def late_keys(pieces: Sequence[tuple[bool, str]]) -> list[bytes]:
    """Keys of the passages that are read together (late chunking): their context, their place there, the end of their own key.

    Each comes with whether there is a space before it. In the order of their keys they are in that of their document.
    """
    own = [passage_key(text) for _, text in pieces]
    spaces = bytes(space for space, _ in pieces)
    context = hashlib.blake2b(b"".join([spaces, *own]), digest_size=CONTEXT_BYTES).digest()
    size = KEY_BYTES - CONTEXT_BYTES - TEXT_BYTES
    return [context + number.to_bytes(size, "big") + key[-TEXT_BYTES:] for number, key in enumerate(own)]


class Splitter:
    """Cuts documents into passages that fit the encoder."""

    def __init__(self, tokenizer: TextTokenizer, passages: PassagesConfig, document_prompt: str) -> None:
        """Raises ConfigError for passages of more tokens than the encoder takes, or without room for a text."""
        tokens = passages.tokens or tokenizer.max_tokens
        most = tokenizer.max_tokens - passages.late
        if tokens > most:
            why = "late chunking takes" if passages.late else "the encoder takes"
            raise ConfigError(f"passages.tokens: {tokens}, {why} {most} at most; lower it or raise encoder.max_tokens")
        self.prompt = document_prompt.strip()
        self._tokenizer = tokenizer
        self._prompt = document_prompt
        self._config = passages
        overlap = passages.overlap if passages.long == "split" else 0
        self._windows = Windows(tokenizer, document_prompt, tokens, 0 if passages.late else overlap)
        self._contexts = Windows(tokenizer, document_prompt, tokenizer.max_tokens, overlap) if passages.late else None

    def __call__(self, texts: Sequence[str], known: Mapping[bytes, int] | None = None) -> list[list[Passage]]:
        """The passages of each text, in order; at least one. ``known``: tokens of whole passages by key, counted before."""
        keys = [passage_key(text) for text in texts]
        counts = {key: known[key] for key in keys if key in known} if known else {}
        fresh = {key: self._prompt + text for key, text in zip(keys, texts, strict=True) if key not in counts}
        counts |= zip(fresh, self._tokenizer.count(list(fresh.values())), strict=True)
        return [self._passages(text, key, counts[key]) for text, key in zip(texts, keys, strict=True)]

    def _passages(self, text: str, key: bytes, count: int) -> list[Passage]:
        limit = self._windows.limit
        if count <= limit:
            return [Passage(key, 0, len(text), text, count)]
        if self._config.long == "truncate":
            return [Passage(key, 0, len(text), text, limit, truncated=True)]
        if self._contexts is not None:
            return self._late(text, self._contexts)
        windows = self._windows(text)
        if self._config.pool == "mean":
            tokens, truncated = sum(window.tokens for window in windows), any(window.truncated for window in windows)
            return [Passage(key, 0, len(text), text, tokens, truncated)]
        pieces = [(window, text[window.start : window.end]) for window in windows]
        return [
            Passage(passage_key(piece), window.start, window.end, piece, window.tokens, window.truncated)
            for window, piece in pieces
        ]

    def _late(self, text: str, contexts: Windows) -> list[Passage]:
        """The windows of each context; what two contexts share is in both, as another passage."""
        passages = []
        for outer in contexts(text):
            windows = [
                replace(each, start=outer.start + each.start, end=outer.start + each.end)
                for each in self._windows(text[outer.start : outer.end])
            ]
            pieces = [
                (before.end < each.start, text[each.start : each.end]) for before, each in pairwise([windows[0], *windows])
            ]
            if len(windows) == 1:
                (window,), ((_, piece),) = windows, pieces
                passages.append(Passage(passage_key(piece), window.start, window.end, piece, window.tokens, window.truncated))
                continue
            spare = [0, *[self._windows.frame_tokens] * (len(windows) - 1)]  # prompt and special tokens are in a context once
            passages += [
                Passage(key, each.start, each.end, piece, each.tokens - frame, each.truncated)
                for key, each, (_, piece), frame in zip(late_keys(pieces), windows, pieces, spare, strict=True)
            ]
        return passages
