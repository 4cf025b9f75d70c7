"""Value -> stable hash, the name of every expensive result.

Refuses any value without one stable form: a float that is not finite, a set, an object.
"""

import hashlib
import json
import math
from pathlib import Path

Plain = str | int | float | bool | None | list["Plain"] | tuple["Plain", ...] | dict[str, "Plain"]
"""What can be fingerprinted."""


def canonical_json(value: Plain) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces; raises TypeError on a value with no stable form."""
    _check(value, "value")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def fingerprint(value: Plain, *, length: int = 20) -> str:
    """First ``length`` hex digits of the SHA-256 of the canonical JSON of ``value``."""
    return sha256(canonical_json(value))[:length]


def sha256(data: bytes | memoryview) -> str:
    """64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """64 hex digits of a local file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(value: Plain, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where}: key {key!r} is no string, it has no stable JSON form")
            _check(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _check(item, f"{where}[{number}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{where}: {value} has no stable JSON form")
    elif not (value is None or isinstance(value, str | int)):
        raise TypeError(f"{where}: {type(value).__name__} has no stable form; pass plain values")
