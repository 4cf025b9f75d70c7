"""Which model: its folder, what identifies it, its limits, its tokenizer.

No torch here, so that planning and splitting start in milliseconds. Refuses weights other than
safetensors and code of the model's own: a model is data.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open
from tokenizers import Encoding, Tokenizer

from pipeline.errors import ConfigError, EncoderError
from pipeline.fingerprint import fingerprint

IDENTITY_SUFFIXES = {".json", ".txt", ".model", ".safetensors"}
FOREIGN_FOLDERS = {"onnx", "openvino", ".git", ".cache"}
UNLIMITED_TOKENS = 1 << 30
"""The limit of a static (bag of tokens) model, which has none."""
CHARS_PER_TOKEN = 64
"""First cut of a long text before it is tokenized, per token of the limit: one 10 MB document costs the
tokenizer 17 s and 1.5 GB even with truncation on (measured, tokenizers 0.23)."""


@dataclass(frozen=True)
class EncoderSpec:
    """Everything that changes a vector. ``space``: hash of model files, prompt, max tokens. Precision, backend: resolved."""

    model: str
    revision: str | None
    document_prompt: str
    query_prompt: str
    max_tokens: int
    dim: int
    precision: str
    space: str
    backend: str = "torch"

    @property
    def fingerprint(self) -> str:
        """Name of the embedding store: space and numerics. The query prompt changes no stored vector."""
        return fingerprint({"space": self.space, "precision": self.precision, "backend": self.backend})

    def as_dict(self) -> dict[str, Any]:
        """Plain values for manifests and Ray."""
        return asdict(self)


@dataclass(frozen=True)
class ModelFolder:
    """A SentenceTransformer folder on this machine."""

    path: Path
    prompts: dict[str, str]
    max_seq_length: int
    dim: int
    files_hash: str
    traceable: bool
    """Whether a graph of (ids, mask) can say it all: a transformer, pooled over every token."""


def find_model(model: str, revision: str | None = None) -> ModelFolder:
    """Locate a model by folder, ``package:<import name>/<folder>`` or hub id + revision.

    Raises ConfigError when it is not there, EncoderError when it is no SentenceTransformer with safetensors.
    """
    path = _locate(model, revision)
    if not (path / "modules.json").is_file():
        raise EncoderError(f"{path}: no modules.json, so no SentenceTransformer folder; save one with model.save()")
    modules = cast(list[dict[str, str]], _read_json(path / "modules.json"))
    weights = [file for file in path.rglob("*.safetensors") if not FOREIGN_FOLDERS & set(file.relative_to(path).parts)]
    if not weights:
        raise EncoderError(f"{path}: no .safetensors weights; convert them (pickled weights can run code when loaded)")
    settings = _read_json(path / "config_sentence_transformers.json", missing={})
    prompts = {name: str(text) for name, text in (settings.get("prompts") or {}).items()}
    return ModelFolder(
        path, prompts, _max_seq_length(path, modules), _dim(path, modules), _hash_files(str(path)), _traceable(path, modules)
    )


def resolve_spec(
    *,
    model: str,
    revision: str | None = None,
    document_prompt: str | None = None,
    query_prompt: str | None = None,
    max_tokens: int | None = None,
    precision: str = "fp32",
    backend: str = "torch",
) -> tuple[EncoderSpec, ModelFolder]:
    """Fill in what the model itself says: prompts, max tokens, identity. ``precision`` and ``backend`` are resolved ones."""
    folder = find_model(model, revision)
    document = folder.prompts.get("document", "") if document_prompt is None else document_prompt
    query = folder.prompts.get("query", "") if query_prompt is None else query_prompt
    limit = folder.max_seq_length if max_tokens is None else max_tokens
    if limit > folder.max_seq_length and (position := _max_positions(folder.path)) < limit:
        raise ConfigError(f"encoder.max_tokens: {limit}, but {model} has {position} positions; lower it")
    space = fingerprint({"files": folder.files_hash, "document_prompt": document, "max_tokens": limit, "normalize": True})
    return EncoderSpec(model, revision, document, query, limit, folder.dim, precision, space, backend), folder


class TextTokenizer:
    """The model's fast tokenizer, cut at ``max_tokens``, without padding. Same ids as sentence-transformers gives."""

    def __init__(self, folder: ModelFolder, max_tokens: int) -> None:
        file = next(
            (f for f in (folder.path / "tokenizer.json", folder.path / "0_StaticEmbedding" / "tokenizer.json") if f.is_file()),
            None,
        )
        if file is None:
            raise EncoderError(f"{folder.path}: no tokenizer.json; save the model with its fast tokenizer")
        self._tokenizer = Tokenizer.from_file(str(file))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.is_static = not (folder.path / "config.json").is_file()
        self.max_tokens = max_tokens
        self.special_tokens = 0 if self.is_static else self._tokenizer.num_special_tokens_to_add(False)
        self._head_chars = min(max_tokens, 1 << 16) * CHARS_PER_TOKEN

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids with special tokens, at most ``max_tokens`` each."""
        encodings = self._encode([text[: self._head_chars] for text in texts])
        return [self._cut(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Character span of each token of the whole text, special tokens left out."""
        return self._tokenizer.encode(text, add_special_tokens=False).offsets

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens with special tokens, not cut; a text cut before tokenizing counts as ``max_tokens + 1`` at least."""
        return [
            len(encoding.ids) if len(text) <= self._head_chars else self._count_long(text)
            for text, encoding in zip(texts, self._encode([text[: self._head_chars] for text in texts]), strict=True)
        ]

    def _encode(self, texts: list[str]) -> list[Encoding]:
        return self._tokenizer.encode_batch_fast(texts, add_special_tokens=not self.is_static)

    def _count_long(self, text: str) -> int:
        return len(self._long_ids(text))

    def _cut(self, text: str, encoding: Encoding) -> list[int]:
        ids = encoding.ids if len(text) <= self._head_chars else self._long_ids(text)
        if len(ids) <= self.max_tokens:
            return ids
        content = self._content(ids)[: self.max_tokens - self.special_tokens]
        prefix, suffix = self._frame
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
    def _frame(self) -> tuple[list[int], list[int]]:
        if self.is_static:
            return [], []
        ids = self._tokenizer.encode("a").ids
        content = self._tokenizer.encode("a", add_special_tokens=False).ids
        start = next(i for i in range(len(ids)) if ids[i : i + len(content)] == content)
        return ids[:start], ids[start + len(content) :]

    def _content(self, ids: list[int]) -> list[int]:
        prefix, suffix = self._frame
        return ids[len(prefix) : len(ids) - len(suffix)]

    def prompt_tokens(self, prompt: str) -> int:
        """Tokens that ``prompt`` takes before a text, leading special tokens included (as sentence-transformers counts)."""
        return len(self._encode([prompt])[0].ids) - len(self._frame[1]) if prompt else 0


def _locate(model: str, revision: str | None) -> Path:
    if model.startswith("package:"):
        package, _, folder = model.removeprefix("package:").partition("/")
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            raise ConfigError(f"encoder.model: {model}: package {package} is not installed; pip install it")
        return Path(found.origin).parent / folder
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise ConfigError(f"encoder.model: {model}: no such folder; give a folder, package:<name>/<folder> or a hub id")
    if revision is None:
        raise ConfigError(f"encoder.model: {model}: a hub model needs encoder.revision, or its vectors could change unseen")
    from huggingface_hub import snapshot_download  # slow to import, and only hub models need it

    try:
        return Path(
            snapshot_download(
                model, revision=revision, ignore_patterns=["*.bin", "*.h5", "*.ot", "*.msgpack", "onnx/*", "openvino/*"]
            )
        )
    except (OSError, ValueError) as error:
        raise EncoderError(
            f"encoder.model: {model}@{revision}: cannot be fetched, {error}; check name, revision, network"
        ) from error


@lru_cache(maxsize=8)
def _hash_files(folder: str) -> str:
    path = Path(folder)
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        if file.is_file() and file.suffix in IDENTITY_SUFFIXES and not FOREIGN_FOLDERS & set(relative.parts):
            with file.open("rb") as handle:
                total.update(f"{relative.as_posix()}:{hashlib.file_digest(handle, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _max_seq_length(path: Path, modules: list[dict[str, str]]) -> int:
    if not (path / "config.json").is_file() and "StaticEmbedding" in modules[0]["type"]:
        return UNLIMITED_TOKENS
    first = path / modules[0]["path"]
    for name in ("sentence_bert_config.json", "sentence_roberta_config.json", "sentence_xlm-roberta_config.json"):
        if length := _read_json(first / name, missing={}).get("max_seq_length"):
            return int(length)
    limit = _read_json(first / "tokenizer_config.json", missing={}).get("model_max_length", UNLIMITED_TOKENS)
    return int(min(limit, _max_positions(path)))


def _dim(path: Path, modules: list[dict[str, str]]) -> int:
    """Width of the vectors, from the last module that states one."""
    for module in reversed(modules):
        settings = _read_json(path / module["path"] / "config.json", missing={})
        if "out_features" in settings:
            return int(settings["out_features"])
        width = settings.get("embedding_dimension") or settings.get("word_embedding_dimension") or settings.get("hidden_size")
        if width:
            modes = settings.get("pooling_mode", [])
            poolings = sum(value is True for name, value in settings.items() if name.startswith("pooling_mode_"))
            return int(width) * max(1, poolings, len(modes) if isinstance(modes, list) else 1)
        if "StaticEmbedding" in module["type"]:
            with safe_open(path / module["path"] / "model.safetensors", framework="numpy") as weights:
                name = next(iter(set(weights.keys()) & {"embedding.weight", "embeddings"}))
                return int(weights.get_slice(name).get_shape()[1])
    raise EncoderError(f"{path}: no module states the dimension of its vectors; save the model with model.save()")


def _traceable(path: Path, modules: list[dict[str, str]]) -> bool:
    kinds = {module["type"].rpartition(".")[2]: path / module["path"] for module in modules}
    pooling = _read_json(kinds["Pooling"] / "config.json", missing={}) if "Pooling" in kinds else {}
    known = {"Transformer", "Pooling", "Dense", "Normalize"}
    return "Transformer" in kinds and kinds.keys() <= known and pooling.get("include_prompt", True) is True


def _max_positions(path: Path) -> int:
    return int(_read_json(path / "config.json", missing={}).get("max_position_embeddings", UNLIMITED_TOKENS))


def _read_json(file: Path, *, missing: dict[str, Any] | None = None) -> Any:
    if missing is not None and not file.is_file():
        return missing
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EncoderError(f"{file}: not valid JSON, {error}; the model folder is damaged") from error
