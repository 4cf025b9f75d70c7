"""What the README says is run and compared."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).parent.parent
README = (HOME / "README.md").read_text(encoding="utf-8")
MEGABYTE = 10**6
TREE_ROOTS = ("pipeline", "jobs", "configs", "docker")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_for_programs")
def test_tour_and_plain_faiss_run_as_written(tmp_path):
    commands = [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    assert len(commands) >= 10
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    outputs = []
    for command in commands:
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        outputs.append((command, done.stdout))
    answers = [output for command, output in outputs if command.startswith("vecmill search")]
    assert answers[0].splitlines()[1].split()[2] == "b"
    assert [line.split()[2] for line in answers[1].splitlines()[1:]] == ["d"]

    artifacts = sorted((tmp_path / "index" / "artifacts").iterdir())
    assert len(artifacts) == 2
    (tmp_path / "artifact").symlink_to(artifacts[-1])
    assert len(blocks("python")) == 2
    for code in blocks("python"):
        environment = os.environ | {"PYTHONPATH": str(HOME)}
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "How central banks fight inflation." in done.stdout


def test_tree_names_every_file_once():
    tree = README[README.index("## The tree") :]
    listed, folders = [], []
    for indent, name in re.findall(r"^( *)(\S+\.(?:py|yaml|txt|jinja|html)|\S+/)(?: |$)", tree[: tree.rindex("```")], re.M):
        folders = [*folders[: len(indent) // 2], name.rstrip("/")]
        listed.append("/".join(folders))
    files = [path for root in TREE_ROOTS for path in (HOME / root).rglob("*")]
    kinds = {".py", ".yaml", ".txt", ".jinja", ".html"}
    names = [path.relative_to(HOME).as_posix() for path in files if path.suffix in kinds and path.name != "__init__.py"]
    roots = tuple(f"{root}/" for root in TREE_ROOTS)
    assert sorted(name for name in listed if name.startswith(roots) and Path(name).suffix) == sorted(names)


def test_every_command_is_described():
    from jobs.__main__ import app

    commands = {command.callback.__name__.replace("_", "-") for command in app.registered_commands}
    commands |= {
        f"{group.name} {command.callback.__name__}"
        for group in app.registered_groups
        for command in group.typer_instance.registered_commands
    }
    commands |= {group.name for group in app.registered_groups if group.typer_instance.info.invoke_without_command is True}
    table = set(
        re.findall(r"`([\w -]+)`", "\n".join(line.split("|")[1] for line in README.splitlines() if line.startswith("| `")))
    )
    assert table | {"version"} == commands


def test_every_measured_number_is_in_a_committed_result():
    section = README[README.index("## Measured") : README.index("## The tree")]
    rows = [line for line in section.splitlines() if line.startswith("|") and not line.startswith("|---")][1:]
    values = [
        value for file in (HOME / "tests" / "benchmarks").glob("*.json") for value in _numbers(json.loads(file.read_text()))
    ]
    values += [value / 1e6 for value in values if value >= MEGABYTE]
    formats = ("{:.3g}", "{:.4g}", "{:.7g}", "{:.1f}", "{:.2f}", "{:.3f}", "{:.4f}", "{:.6f}", "{:,.0f}")
    known = {form.format(value) for form in formats for value in values}
    numbers = [
        number for row in rows for number in re.findall(r"(?<![\w@.,-])\d[\d,]*(?:\.\d+)?(?![\w@-])", row.split("|", 2)[2])
    ]
    assert len(numbers) >= 8
    for number in numbers:
        assert number in known, f"{number} is in no committed result"


def _numbers(value):
    if isinstance(value, dict):
        return [number for item in value.values() for number in _numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, int | float) else []


def test_docstring_of_every_module_is_there():
    for file in [*(HOME / "pipeline").rglob("*.py"), *(HOME / "jobs").rglob("*.py")]:
        assert ast.get_docstring(ast.parse(file.read_text())), file
