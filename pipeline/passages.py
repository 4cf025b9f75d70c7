"""Documents -> passages: the texts that are encoded, each under the hash of itself.

A document of more tokens than a passage has is split into windows, or cut. Spans are character offsets in the normalised
document.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config_what import PassagesConfig
from pipeline.errors import ConfigError
from pipeline.tokenizer import TextTokenizer
from pipeline.windows import Windows

KEY_BYTES = 16


@dataclass(frozen=True)
class Passage:
    """One text to encode. ``tokens`` counts prompt and special tokens; ``truncated``: the encoder sees only its beginning.

    ``context``: 8 bytes that name what it is read in, the passages of its document with the same name (late chunking).
    """

    key: bytes
    start: int
    end: int
    text: str
    tokens: int
    truncated: bool = False
    context: bytes | None = None


def passage_key(text: str) -> bytes:
    """BLAKE2b-128 of the passage text, before the prompt: 16 bytes."""
    return hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).digest()


def late_keys(texts: Sequence[str]) -> tuple[bytes, list[bytes]]:
    """Name of the context that passages of these texts make together, and their keys, which it decides too.

    The second half of a key is that of ``passage_key``.
    """
    half = KEY_BYTES // 2
    own = [passage_key(text) for text in texts]
    context = hashlib.blake2b(b"".join(own), digest_size=KEY_BYTES).digest()
    places = (hashlib.blake2b(context + number.to_bytes(4, "big"), digest_size=half) for number in range(len(own)))
    return context[:half], [place.digest() + key[half:] for place, key in zip(places, own, strict=True)]


class Splitter:
    """Cuts documents into passages that fit the encoder."""

    def __init__(self, tokenizer: TextTokenizer, passages: PassagesConfig, document_prompt: str) -> None:
        """Raises ConfigError for passages of more tokens than the encoder takes, or without room for a text."""
        tokens = passages.tokens or tokenizer.max_tokens
        if tokens > tokenizer.max_tokens:
            raise ConfigError(
                f"passages.tokens: {tokens}, the encoder takes {tokenizer.max_tokens}; lower it or raise encoder.max_tokens"
            )
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
            context = text[outer.start : outer.end]
            windows = self._windows(context)
            pieces = [context[window.start : window.end] for window in windows]
            name, keys = late_keys(pieces)
            passages += [
                Passage(key, outer.start + window.start, outer.start + window.end, piece, window.tokens, window.truncated, name)
                for key, window, piece in zip(keys, windows, pieces, strict=True)
            ]
        return passages
