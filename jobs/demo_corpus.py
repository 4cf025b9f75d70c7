"""The demo's corpus: the docstrings of the Python standard library, real text that is on every machine.

Modules are parsed, never imported. Tests, the vendored pip and IDLE are left out.
"""

import ast
import inspect
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LEFT_OUT = {"test", "tests", "idlelib", "idle_test", "lib2to3", "site-packages", "turtledemo", "ensurepip", "__pycache__"}
MIN_CHARS = 40
"""Shorter docstrings ("Docs.", "See above.") tell a search nothing."""


def write_corpus(file: Path) -> int:
    """Write one JSON line per docstring (id, title, text, kind); returns their number."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in docstrings()]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def docstrings() -> Iterator[dict[str, str]]:
    """Every docstring of the standard library: qualified name as id, signature-like title, cleaned text."""
    library = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    for source in sorted(library.rglob("*.py")):
        relative = source.relative_to(library)
        if LEFT_OUT & set(relative.parts):
            continue
        try:
            tree = ast.parse(source.read_bytes())
        except SyntaxError:  # lib2to3 style samples of other Python versions
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        for name, node in _definitions(tree, module):
            text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
            if len(text) >= MIN_CHARS and name not in seen:
                seen.add(name)
                yield {"id": name, "title": name, "text": text, "kind": _KINDS[type(node)]}


_Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_KINDS: dict[type[ast.AST], str] = {
    ast.Module: "module",
    ast.ClassDef: "class",
    ast.FunctionDef: "function",
    ast.AsyncFunctionDef: "function",
}


def _definitions(node: ast.AST, name: str) -> Iterator[tuple[str, _Definition]]:
    if isinstance(node, _Definition):
        yield name, node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _definitions(child, f"{name}.{child.name}")
        elif isinstance(child, ast.If | ast.Try):
            yield from _definitions(child, name)
