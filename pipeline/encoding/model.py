"""Which encoder: what identifies it, its limits. No torch here, so that planning and splitting start in milliseconds."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack, cast

from safetensors import safe_open

from pipeline.encoding.model_files import check_code, check_pinned, check_weights, hash_files, locate, read_json
from pipeline.errors import ConfigError, EncoderError
from pipeline.fingerprint import fingerprint

DOCUMENT_PROMPTS = ("document", "passage", "corpus")
"""Names of a model's prompt for documents, the first that it has, as sentence-transformers looks for it."""
UNLIMITED_TOKENS = 1 << 30
"""The limit of a static (bag of tokens) model, which has none."""
OVERFLOWING = ("t5", "mt5", "umt5", "gemma3", "gemma3_text")
"""Model types whose activations leave the range of FP16; they were trained in BF16."""


@dataclass(frozen=True)
class EncoderSpec:
    """Everything that changes a vector. Precision, backend: resolved.

    ``space``: hash of model files, prompt, max tokens, dim, windows.
    ``query_model``: encodes the queries instead of ``model``; ``query_space`` is its own. ``window``: the vector of a document
    of more tokens is the mean of those of its windows, which share ``overlap`` (see windows); None: it is cut.
    """

    model: str
    revision: str | None
    document_prompt: str
    query_prompt: str
    max_tokens: int
    dim: int
    precision: str
    space: str
    backend: str = "torch"
    query_model: str | None = None
    query_revision: str | None = None
    query_space: str | None = None
    trust_remote_code: bool = False
    window: int | None = None
    overlap: int | None = None

    @property
    def fingerprint(self) -> str:
        """Name of the embedding store: space and numerics. The query prompt changes no stored vector."""
        return fingerprint({"space": self.space, "precision": self.precision, "backend": self.backend})

    @property
    def request(self) -> "EncoderRequest":
        """What gives this spec again."""
        return cast(EncoderRequest, {name: getattr(self, name) for name in EncoderRequest.__annotations__})

    def for_queries(self) -> "EncoderSpec":
        """The spec of what encodes queries; raises EncoderError when the query model here is not the one planned with."""
        if self.query_model is None:
            return self
        spec, _ = resolve_spec(
            model=self.query_model,
            revision=self.query_revision,
            query_prompt=self.query_prompt,
            dim=self.dim,
            trust_remote_code=self.trust_remote_code,
        )
        if spec.space != self.query_space:
            raise EncoderError(f"{self.query_model}: not the query model that the artifact was made for; install the same one")
        return spec

    @property
    def prompts(self) -> tuple[str, str]:
        """Those of documents and of queries."""
        return self.document_prompt, self.query_prompt

    def as_dict(self) -> dict[str, Any]:
        """Plain values for manifests and Ray."""
        return asdict(self)


class EncoderRequest(TypedDict, total=False):
    """What of a config says which vectors; what is None or missing, the model says itself."""

    model: str
    revision: str | None
    document_prompt: str | None
    query_prompt: str | None
    max_tokens: int | None
    dim: int | None
    query_model: str | None
    query_revision: str | None
    trust_remote_code: bool
    window: int | None
    overlap: int | None


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
    mean_pooled: bool
    """Whether such a one is pooled by the mean of its tokens, so that some of them have a mean of their own."""
    is_static: bool
    """Whether it is a bag of token vectors, without a transformer."""
    overflows: bool
    """Whether its activations leave the range of FP16, as far as its config tells."""


def find_model(model: str, revision: str | None = None) -> ModelFolder:
    """Locate a model by folder, ``package:<import name>/<folder>`` or hub id + revision.

    Raises ConfigError when it is not there, EncoderError when it is no SentenceTransformer with safetensors.
    """
    path = locate(model, revision)
    if not (path / "modules.json").is_file():
        raise EncoderError(f"{path}: no modules.json, so no SentenceTransformer folder; save one with model.save()")
    modules = cast(list[dict[str, str]], read_json(path / "modules.json"))
    check_weights(path)
    settings = read_json(path / "config_sentence_transformers.json", missing={})
    prompts = {name: str(text) for name, text in (settings.get("prompts") or {}).items()}
    return ModelFolder(
        path,
        prompts,
        _max_seq_length(path, modules),
        _dim(path, modules),
        hash_files(str(path)),
        _traceable(path, modules),
        _traceable(path, modules) and _pooling_modes(path, modules) == {"mean"},
        is_static=_is_static(modules),
        overflows=overflows(path),
    )


def resolve_spec(
    *, precision: str = "fp32", backend: str = "torch", **request: Unpack[EncoderRequest]
) -> tuple[EncoderSpec, ModelFolder]:
    """Fill in what the model itself says: prompts, max tokens, dim, identity. ``precision`` and ``backend`` are resolved ones.

    Raises ConfigError for a request that the model cannot fulfil.
    """
    model, revision, trusted = request["model"], request.get("revision"), request.get("trust_remote_code", False)
    if trusted:
        check_pinned(model, revision)
    folder = find_model(model, revision)
    if trusted:
        check_code(folder.path)
    query_folder, query_space = folder, None
    if (query_model := request.get("query_model")) is not None:
        own: EncoderRequest = {"model": query_model, "revision": request.get("query_revision"), "dim": request.get("dim")}
        own["trust_remote_code"] = trusted
        query_spec, query_folder = resolve_spec(**own)
        query_space = query_spec.space
        if not request.get("dim") and query_folder.dim != folder.dim:
            raise ConfigError(f"encoder.query_model: {query_folder.dim} dimensions, encoder.model has {folder.dim}; use a pair")
    own_document = next((folder.prompts[name] for name in DOCUMENT_PROMPTS if name in folder.prompts), "")
    asked, asked_query = request.get("document_prompt"), request.get("query_prompt")
    document = own_document if asked is None else asked
    query = query_folder.prompts.get("query", "") if asked_query is None else asked_query
    limit, dim = request.get("max_tokens") or folder.max_seq_length, request.get("dim") or folder.dim
    if limit > folder.max_seq_length and (position := max_positions(folder.path)) < limit:
        raise ConfigError(f"encoder.max_tokens: {limit}, but {model} has {position} positions; lower it")
    if dim > folder.dim:
        raise ConfigError(f"encoder.dim: {dim}, but {model} has {folder.dim} dimensions; lower it")
    window, overlap = request.get("window"), request.get("overlap")
    pooled = {} if window is None or folder.is_static else {"window": min(window, limit), "overlap": overlap}
    files = {"files": folder.files_hash} if dim == folder.dim else {"files": folder.files_hash, "dim": str(dim)}
    space = fingerprint(
        {
            **files,
            "document_prompt": document,
            "max_tokens": limit,
            "normalize": True,
            "special_tokens": "spelled out",
            **pooled,
        }
    )
    spec = EncoderSpec(
        model=model,
        revision=revision,
        document_prompt=document,
        query_prompt=query,
        max_tokens=limit,
        dim=dim,
        precision=precision,
        space=space,
        backend=backend,
        query_model=query_model,
        query_revision=request.get("query_revision"),
        query_space=query_space,
        trust_remote_code=trusted,
        **pooled,
    )
    return spec, folder


def overflows(path: Path) -> bool:
    """Whether a model's activations leave the range of FP16, as far as its config tells."""
    config = read_json(path / "config.json", missing={})
    return config.get("model_type") in OVERFLOWING or config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def _max_seq_length(path: Path, modules: list[dict[str, str]]) -> int:
    if _is_static(modules):
        return UNLIMITED_TOKENS
    first = path / modules[0]["path"]
    for name in ("sentence_bert_config.json", "sentence_roberta_config.json", "sentence_xlm-roberta_config.json"):
        if length := read_json(first / name, missing={}).get("max_seq_length"):
            return int(length)
    limit = read_json(first / "tokenizer_config.json", missing={}).get("model_max_length", UNLIMITED_TOKENS)
    return int(min(limit, max_positions(path)))


def _is_static(modules: list[dict[str, str]]) -> bool:
    return "StaticEmbedding" in modules[0]["type"]


def _dim(path: Path, modules: list[dict[str, str]]) -> int:
    """Width of the vectors, from the last module that states one."""
    for module in reversed(modules):
        settings = read_json(path / module["path"] / "config.json", missing={})
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
    pooling = read_json(kinds["Pooling"] / "config.json", missing={}) if "Pooling" in kinds else {}
    known = {"Transformer", "Pooling", "Dense", "Normalize"}
    return "Transformer" in kinds and kinds.keys() <= known and pooling.get("include_prompt", True) is True


def _pooling_modes(path: Path, modules: list[dict[str, str]]) -> set[str]:
    for module in modules:
        if module["type"].rpartition(".")[2] == "Pooling":
            settings = read_json(path / module["path"] / "config.json", missing={})
            if modes := settings.get("pooling_mode"):
                return {modes} if isinstance(modes, str) else set(modes)
            named = {name for name, value in settings.items() if name.startswith("pooling_mode_") and value is True}
            return {name.removeprefix("pooling_mode_").removesuffix("_tokens") for name in named} or {"mean"}
    return set()


def max_positions(path: Path) -> int:
    """Tokens of the longest text that a model has positions for."""
    return int(read_json(path / "config.json", missing={}).get("max_position_embeddings", UNLIMITED_TOKENS))
