"""The files of a model on this machine, whatever the model is for.

Refuses weights other than safetensors, and code of the model's own unless it comes from a pinned commit: a model is data.
"""

import hashlib
import importlib.util
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, EncoderError
from pipeline.fingerprint import sha256_file

IDENTITY_SUFFIXES = {".json", ".txt", ".model", ".safetensors", ".py"}
FOREIGN_FOLDERS = {"onnx", "openvino", ".git", ".cache"}
COMMIT = re.compile("[0-9a-f]{40}")
ENCODER_KEYS = ("encoder.model", "encoder.revision")
ENCODER, CROSS_ENCODER, LATE_INTERACTION = "SentenceTransformer", "CrossEncoder", "MultiVectorEncoder"
"""Kinds of models, by their classes in sentence-transformers."""


def locate(model: str, revision: str | None, keys: tuple[str, str] = ENCODER_KEYS) -> Path:
    """The folder of a model given as folder, ``package:<import name>/<folder>`` or hub id + revision.

    ``keys``: of model and revision in the config, for errors. Raises ConfigError when there is no such model, EncoderError
    when the hub does not give it.
    """
    key, revision_key = keys
    if model.startswith("package:"):
        package, _, folder = model.removeprefix("package:").partition("/")
        try:
            found = importlib.util.find_spec(package)
        except (ImportError, ValueError):  # of a package inside one that is not there, or of none
            found = None
        if found is None or found.origin is None:
            raise ConfigError(f"{key}: {model}: package {package} is not installed; pip install it")
        return Path(found.origin).parent / folder
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise ConfigError(f"{key}: {model}: no such folder; give a folder, package:<name>/<folder> or a hub id")
    if revision is None:
        raise ConfigError(f"{key}: {model}: a hub model needs {revision_key}, or its results could change unseen")
    from huggingface_hub import snapshot_download  # slow to import, and only hub models need it

    try:
        return Path(
            snapshot_download(
                model, revision=revision, ignore_patterns=["*.bin", "*.h5", "*.ot", "*.msgpack", "onnx/*", "openvino/*"]
            )
        )
    except (OSError, ValueError) as error:
        raise EncoderError(f"{key}: {model}@{revision}: cannot be fetched, {error}; check name, revision, network") from error


def check_weights(path: Path) -> None:
    """Raise EncoderError unless a model folder has weights as safetensors."""
    if all(FOREIGN_FOLDERS & set(file.relative_to(path).parts) for file in path.rglob("*.safetensors")):
        raise EncoderError(f"{path}: no .safetensors weights; convert them (pickled weights can run code when loaded)")


def kind_of(path: Path) -> str:
    """What a model folder says that it is: one of the kinds above, or something else."""
    if (path / "modules.json").is_file():
        kind = read_json(path / "config_sentence_transformers.json", missing={}).get("model_type", ENCODER)
    else:
        named = read_json(path / "config.json", missing={}).get("architectures") or ["no config.json with architectures"]
        kind = CROSS_ENCODER if named[0].endswith("ForSequenceClassification") else named[0]
    return {"ColBERT": LATE_INTERACTION, "HF_ColBERT": LATE_INTERACTION}.get(kind, str(kind))


def check_pinned(model: str, revision: str | None) -> None:
    """Raise ConfigError unless the code of a model comes from a commit that is pinned."""
    if not COMMIT.fullmatch(revision or ""):
        raise ConfigError(f"encoder.trust_remote_code: only from a pinned commit, {model} has {revision}; give 40 hex digits")


def check_code(path: Path) -> None:
    """Refuse a model whose code is in another repository, which its own commit does not pin."""
    for file in path.rglob("*.json"):
        settings = read_json(file)
        named = settings.get("auto_map") if isinstance(settings, dict) else None
        for name in (named or {}).values():
            if "--" in str(name):
                raise EncoderError(f"{file}: {name} is code of another repository, of no pinned commit; copy it to the model")


@lru_cache(maxsize=8)
def hash_files(folder: str) -> str:
    """SHA-256 over the names and bytes of all files that a model's results depend on."""
    path = Path(folder)
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        if file.is_file() and file.suffix in IDENTITY_SUFFIXES and not FOREIGN_FOLDERS & set(relative.parts):
            total.update(f"{relative.as_posix()}:{sha256_file(file)}\n".encode())
    return total.hexdigest()


def read_json(file: Path, *, missing: dict[str, Any] | None = None) -> Any:
    """A JSON file of a model, or ``missing`` where there is none; raises EncoderError for one that is damaged."""
    if missing is not None and not file.is_file():
        return missing
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EncoderError(f"{file}: not valid JSON, {error}; the model folder is damaged") from error
