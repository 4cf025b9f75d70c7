"""The model's fast tokenizer, cut to its limit, with the ids that sentence-transformers gives.

But for one case: a text that spells out a special token (``[SEP]``) has it as the characters it is made of. In
sentence-transformers it would end the text for the model, so that whoever writes a document could hide the rest of it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import Encoding, Tokenizer

from pipeline.encoding.model import ModelFolder
from pipeline.errors import EncoderError

CHARS_PER_TOKEN = 64
"""First cut of a long text before it is tokenized, per token of the limit: one 10 MB document costs the
tokenizer 17 s and 1.5 GB even with truncation on (measured, tokenizers 0.23)."""


class TextTokenizer:
    """The model's fast tokenizer, cut at ``max_tokens``, without padding.

    ``prompts``: what is put before texts; where one has a special token in it, special tokens in texts count as such too.
    """

    def __init__(self, folder: ModelFolder, max_tokens: int, prompts: Sequence[str] = ()) -> None:
        self._tokenizer = _open(folder.path)
        special = [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]
        self._tokenizer.encode_special_tokens = not any(token in prompt for token in special for prompt in prompts)
        self.is_static = folder.is_static
        self.max_tokens = max_tokens
        self.special_tokens = 0 if self.is_static else self._tokenizer.num_special_tokens_to_add(False)
        self._head_chars = min(max_tokens, 1 << 16) * CHARS_PER_TOKEN

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids with special tokens, at most ``max_tokens`` each."""
        encodings = self._encode([text[: self._head_chars] for text in texts])
        return [self._cut(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]

    def words(self) -> list[str]:
        """Whole words of the vocabulary, in order."""
        return sorted(word for word in self._tokenizer.get_vocab() if word.isascii() and word.isalpha())

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Character span of each token of the whole text, special tokens left out; without white space before a word."""
        spans = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return [(end - len(text[start:end].lstrip()), end) for start, end in spans]

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens with special tokens, not cut; a text cut before tokenizing counts as ``max_tokens + 1`` at least."""
        return [
            len(encoding.ids) if len(text) <= self._head_chars else len(self._long_ids(text))
            for text, encoding in zip(texts, self._encode([text[: self._head_chars] for text in texts]), strict=True)
        ]

    def _encode(self, texts: list[str]) -> list[Encoding]:
        return self._tokenizer.encode_batch_fast(texts, add_special_tokens=not self.is_static)

    def _cut(self, text: str, encoding: Encoding) -> list[int]:
        ids = encoding.ids if len(text) <= self._head_chars else self._long_ids(text)
        if len(ids) <= self.max_tokens:
            return ids
        content = self._content(ids)[: self.max_tokens - self.special_tokens]
        prefix, suffix = self.frame
        return prefix + content + suffix

    def _long_ids(self, text: str) -> list[int]:
        """Ids of a beginning of ``text`` that is long enough to fill the limit with two tokens to spare."""
        size = self._head_chars
        while True:
            ids = self._encode([text[:size]])[0].ids
            if len(ids) > self.max_tokens + 2 or size >= len(text):
                return ids
            size *= 4

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        """Special tokens before and after a text."""
        if self.is_static:
            return [], []
        ids = self._tokenizer.encode("a").ids
        content = self._tokenizer.encode("a", add_special_tokens=False).ids
        start = next(i for i in range(len(ids)) if ids[i : i + len(content)] == content)
        return ids[:start], ids[start + len(content) :]

    def _content(self, ids: list[int]) -> list[int]:
        prefix, suffix = self.frame
        return ids[len(prefix) : len(ids) - len(suffix)]

    def prompt_tokens(self, prompt: str) -> int:
        """Tokens that ``prompt`` takes before a text, leading special tokens included (as sentence-transformers counts)."""
        return len(self._encode([prompt])[0].ids) - len(self.frame[1]) if prompt else 0


class Pair(NamedTuple):
    """Token ids of a query and a text in one row, special tokens included, and the type (0 or 1) of each."""

    ids: list[int]
    types: list[int]


class PairTokenizer:
    """The fast tokenizer of a cross-encoder: a query before each text, at most ``max_tokens`` together.

    The text is cut, but for a query that would leave it less than a quarter of the room.
    """

    def __init__(self, path: Path, max_tokens: int) -> None:
        self._tokenizer = _open(path)
        self._tokenizer.encode_special_tokens = True
        self._room = max_tokens - self._tokenizer.num_special_tokens_to_add(True)
        self._head_chars = min(max_tokens, 1 << 16) * CHARS_PER_TOKEN

    def __call__(self, query: str, texts: Sequence[str]) -> list[Pair]:
        """One pair for each text, in their order. Characters beyond 64 per token of the limit are not read."""
        first, *seconds = self._tokenizer.encode_batch_fast(
            [text[: self._head_chars] for text in (query, *texts)], add_special_tokens=False
        )
        first.truncate(self._room * 3 // 4)
        pairs = []
        for second in seconds:
            second.truncate(self._room - len(first.ids))
            joined = self._tokenizer.post_process(first, second)
            pairs.append(Pair(joined.ids, joined.type_ids))
        return pairs


def _open(path: Path) -> Tokenizer:
    """The tokenizer of a model folder, without padding and truncation; raises EncoderError when it has no fast one."""
    file = next((f for f in (path / "tokenizer.json", path / "0_StaticEmbedding" / "tokenizer.json") if f.is_file()), None)
    if file is None:
        raise EncoderError(f"{path}: no tokenizer.json; save the model with its fast tokenizer")
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
