"""Reading a config: YAML, ``a.b=value`` overrides, validation with one line per problem."""

import difflib
import os
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config import Config
from pipeline.errors import ConfigError

MAX_CONFIG_BYTES = 1 << 20
"""A config is read by people; a larger file is a mistake or a YAML bomb."""


def load_config(path: str | os.PathLike[str], overrides: tuple[str, ...] = ()) -> Config:
    """Read YAML, apply ``a.b=value`` overrides, validate.

    Relative local paths are left as they are: they count from the working directory.
    Raises ConfigError naming the file and the key.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{path}: no such config file; pass -c FILE, see configs/ for examples")
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: {file.stat().st_size} bytes, over the limit of {MAX_CONFIG_BYTES} for a config")
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read, {error.strerror}; check its permissions") from error
    except (yaml.YAMLError, ValueError) as error:  # such as a date that there is not
        raise ConfigError(f"{path}: not valid YAML, {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(data).__name__}")
    for override in overrides:
        _apply(data, override)
    return parse_config(data, where=str(path))


def dump_config(values: dict[str, Any]) -> str:
    """YAML that ``load_config`` reads back as these values."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def parse_config(data: dict[str, Any], *, where: str = "config") -> Config:
    """Validate a mapping; raises ConfigError with one line per problem and a suggestion for unknown keys."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        problems = [_explain(issue["loc"], issue["type"], issue["msg"]) for issue in error.errors()]
        raise ConfigError("\n".join(f"{where}: {problem}" for problem in problems)) from error


def _apply(data: dict[str, Any], override: str) -> None:
    name, separator, value = override.partition("=")
    keys = name.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError(f"--set {override}: expected a.b=value")
    parsed = _override_value(value, override)
    for key in keys[:-1]:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--set {override}: {key} is not a section")
    data[keys[-1]] = parsed


def _override_value(value: str, override: str) -> Any:
    """A YAML number, truth value, null, list or quoted text; anything else is text as it stands (``query: `` too)."""
    try:
        parsed = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML") from error
    as_written = isinstance(parsed, str | dict | date) and not value.lstrip().startswith(("{", '"', "'"))
    return value if as_written or not value else parsed


def _explain(location: tuple[int | str, ...], kind: str, message: str) -> str:
    name = ".".join(str(part) for part in location)
    if kind != "extra_forbidden":
        return f"{name}: {message}" if name else message
    section: Any = Config
    for part in location[:-1]:
        section = section.model_fields[str(part)].annotation
    close = difflib.get_close_matches(str(location[-1]), section.model_fields, n=1, cutoff=0.5)
    known = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(section.model_fields)}"
    return f"{name}: unknown key; {known}"
