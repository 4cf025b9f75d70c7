"""What a job on a cluster is made of: its name, its config, the folder that travels.

A config is written as it was resolved: with overrides applied, local paths absolute, and without anything secret. Secrets
travel apart, as environment variables, or not at all: a cluster's nodes should have a role or an environment of their own.
"""

import shutil
from pathlib import Path
from typing import Any

from pydantic import SecretStr

import pipeline
from pipeline.config import Config, S3Config
from pipeline.config_file import dump_config
from pipeline.errors import ConfigError
from pipeline.fingerprint import fingerprint
from pipeline.root.storage import Storage, strip_scheme, uri_scheme

CONFIG_NAME = "config.yaml"
PATHS = (("root",), ("corpus", "uri"), ("corpus", "deletes"), ("evaluation", "queries"), ("evaluation", "qrels"),
         ("store", "embeddings"))  # fmt: skip
"""Config keys of files that a job reads or writes."""


def digest(config: Config) -> str:
    """Of the root and of what is fingerprinted: two jobs of the same digest would do the same work."""
    what = config.model_dump(mode="json", include={"corpus", "passages", "encoder", "index"})
    return fingerprint({"root": Storage(config.root, config.store).uri, **what}, length=12)


def portable(config: Config) -> str:
    """The config as YAML for another machine: local paths absolute, no secrets, Ray's address left to the job."""
    if uri_scheme(config.root) == "memory":
        raise ConfigError("root: memory:// lives in one process; a job needs a folder that all nodes share, or a bucket")
    values = _without_secrets(config.model_dump(mode="python", exclude={"compute": {"address"}}))
    for *sections, key in PATHS:
        section = values
        for name in sections:
            section = section[name]
        if section[key] and uri_scheme(section[key]) == "file":
            section[key] = _absolute(section[key])
    for key in ("model", "query_model"):  # a folder, unless it is a package or a name on the hub
        if values["encoder"][key] and Path(values["encoder"][key]).expanduser().is_dir():
            values["encoder"][key] = _absolute(values["encoder"][key])
    return dump_config(values)


def secret_environment(s3: S3Config) -> dict[str, str]:
    """The store's keys as every S3 client takes them from its environment; empty where the config has none."""
    if not (s3.key and s3.secret):
        return {}
    return {"AWS_ACCESS_KEY_ID": s3.key.get_secret_value(), "AWS_SECRET_ACCESS_KEY": s3.secret.get_secret_value()}


def pack(folder: Path, config: Config, *, with_code: bool) -> None:
    """Fill a folder with what a job needs: its config and, unless its nodes have vecmill, the code."""
    (folder / CONFIG_NAME).write_text(portable(config), encoding="utf-8")
    home = Path(pipeline.__file__).parent.parent
    for package in ("pipeline", "jobs") if with_code else ():
        shutil.copytree(home / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))


def _without_secrets(values: dict[str, Any]) -> dict[str, Any]:
    kept = {name: _without_secrets(value) if isinstance(value, dict) else value for name, value in values.items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items() if _is_open(value)}


def _is_open(value: object) -> bool:
    return not isinstance(value, SecretStr)


def _absolute(path: str) -> str:
    return str(Path(strip_scheme(path)).expanduser().absolute())
