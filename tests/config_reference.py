"""Writes configs/cluster.yaml, the config reference, from the pydantic models; ``test_config`` compares."""

import types
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from pipeline.config import Config

FILE = Path(__file__).parent.parent / "configs" / "cluster.yaml"
HEADER = """# Every key with its default and its reason: the config reference, written by `make config-reference`.
# As it stands it is a config for a Ray cluster whose nodes share the paths below; `ray job submit --working-dir .
# -- python -m jobs reindex -c configs/cluster.yaml` runs it.
"""
REQUIRED = {"root": "/shared/index", "corpus.uri": "/shared/corpus"}


def reference() -> str:
    return HEADER + "\n".join(_section(Config, "")) + "\n"


def _section(model: type[BaseModel], path: str) -> list[str]:
    indent = "  " * path.count(".")
    lines: list[str] = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            lines += ["", f"{indent}# {(annotation.__doc__ or '').strip()}", f"{indent}{name}:"]
            lines += _section(annotation, f"{path}{name}.")
            continue
        default = field.default if field.default is not PydanticUndefined else REQUIRED[f"{path}{name}"]
        value = yaml.safe_dump([default] if default != () else [[]], default_flow_style=True).strip()[1:-1]
        lines += [f"{indent}# {_choices(annotation)}{field.description}", f"{indent}{name}: {value}"]
    return lines


def _choices(annotation: Any) -> str:
    if get_origin(annotation) in {types.UnionType}:
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    return " | ".join(str(choice) for choice in get_args(annotation)) + ". " if get_origin(annotation) is Literal else ""


if __name__ == "__main__":
    FILE.write_text(reference(), encoding="utf-8")
