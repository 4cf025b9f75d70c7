"""The rules of the house that a machine can see."""

import ast
import importlib.metadata
from pathlib import Path

import pytest

HOME = Path(__file__).parent.parent
SOURCES = sorted([*(HOME / "pipeline").rglob("*.py"), *(HOME / "jobs").rglob("*.py")])
DOORS = {
    "ray": {"stages", "service/ray", "service/router"},
    "fastapi": {"service/app"},
    "starlette": {"service/app", "service/gate", "service/refusals", "service/ray", "service/router"},
    "uvicorn": {"jobs/serve"},
    "prometheus_client": {"operations/exposition"},
    "faiss": {"ann/index", "ann/index_parts", "ann/clustering"},
    "torch": {
        "encoding/torch_engine",
        "encoding/packed",
        "encoding/traced",
        "search/reranker",
        "search/cross_encoder",
        "training/trainer",
    },
    "datasets": {"training/trainer"},
    "openvino": {"encoding/openvino_engine"},
    "sentence_transformers": {
        "encoding/torch_engine",
        "encoding/packed",
        "encoding/encoder_bench",
        "search/reranker",
        "training/trainer",
    },
    "transformers": {"encoding/torch_engine", "encoding/packed", "encoding/encoder_bench", "training/trainer"},
    "tokenizers": {"encoding/tokenizer"},
    "fsspec": {"root/storage"},
    "ir_measures": {"search/judgements"},
    "yaml": {"config_file"},
    "s3fs": {"root/retries"},
    "jinja2": {"reports/report"},
    "matplotlib": {"reports/report"},
    "markupsafe": {"reports/report"},
    "cronsim": {"operations/schedule"},
    "bm25s": {"search/lexical"},
    "Stemmer": {"search/lexical"},
    "langchain_core": {"retrievers/langchain"},
    "llama_index": {"retrievers/llama_index"},
}
SIDE_DOORS = {("ray", "jobs/submit.py")}
"""Files beside the door of a library: a client of a cluster's job API runs nothing."""
ENCODER_NEEDS = {"pipeline.encoder", "pipeline.errors", "pipeline.fingerprint"}
ROOMS = ("encoding", "root", "ingest", "embed", "ann", "search", "artifacts", "operations", "reports")
"""From the bottom to the top: a room knows those before it, and of those after it nothing. The files beside them know all."""


def imports(file: Path, *, top_level: bool = False) -> set[str]:
    tree = ast.parse(file.read_text())
    found: set[str] = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def room(file: Path) -> str:
    parts = file.relative_to(HOME).with_suffix("").parts
    return parts[1] if parts[0] == "pipeline" else parts[0]


def place(file: Path) -> str:
    return "/".join(file.relative_to(HOME).with_suffix("").parts[-2:])


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(HOME)))
def test_heavy_libraries_have_one_door(file: Path) -> None:
    for name in imports(file):
        library = name.partition(".")[0]
        if library in DOORS and (library, file.relative_to(HOME).as_posix()) not in SIDE_DOORS:
            assert {room(file), place(file)} & DOORS[library], f"{file}: {library} is imported outside {DOORS[library]}"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(HOME)))
def test_imports_point_down(file: Path) -> None:
    names = imports(file)
    if room(file) != "jobs":
        assert not any(name.startswith("jobs") for name in names)
    if room(file) not in {"jobs", "run"}:
        assert "pipeline.run" not in names
    if room(file) not in {"jobs", "run", "stages"}:
        assert not any(name.startswith("pipeline.stages") for name in names)
    if room(file) not in {"jobs", "service"}:
        assert not any(name.startswith("pipeline.service") for name in names)


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_reaches_no_room_above_it(name: str) -> None:
    """By whatever way: what it imports, what that imports, and on."""
    modules = {".".join(file.relative_to(HOME).with_suffix("").parts): file for file in SOURCES}
    todo = {module for module in modules if module.startswith(f"pipeline.{name}.")}
    seen: set[str] = set()
    while todo:
        module = todo.pop()
        seen.add(module)
        todo |= (imports(modules[module]) & modules.keys()) - seen
    above = {*ROOMS[ROOMS.index(name) + 1 :], "training", "retrievers", "service", "stages"}
    reached = {module for module in seen if module.split(".")[1] in above}
    assert not reached


def test_every_room_is_known() -> None:
    folders = {file.parent.name for file in (HOME / "pipeline").glob("*/__init__.py")}
    assert folders == {*ROOMS, "retrievers", "service", "stages", "training"}


def test_metrics_are_values() -> None:
    assert imports(HOME / "pipeline" / "metrics.py") == {"dataclasses", "dataclasses.dataclass", "typing", "typing.Literal"}


def test_what_draws_reports_is_loaded_by_nothing_but_a_report() -> None:
    for file in SOURCES:
        drawing = {name for name in imports(file, top_level=True) if name.partition(".")[0] in {"jinja2", "matplotlib"}}
        assert not drawing, f"{file}: {drawing} at the top"


def test_imports_have_no_cycle() -> None:
    modules = {".".join(file.relative_to(HOME).with_suffix("").parts).removesuffix(".__init__"): file for file in SOURCES}
    graph = {name: imports(file, top_level=True) & modules.keys() - {name} for name, file in modules.items()}
    graph = {name: {target for target in targets if target != "pipeline"} for name, targets in graph.items()}
    done: set[str] = set()
    while len(done) < len(graph):
        ready = {name for name, targets in graph.items() if name not in done and targets <= done}
        assert ready, f"cycle among {sorted(set(graph) - done)}"
        done |= ready


def test_encoder_runs_alone() -> None:
    seen, todo = set(), {"pipeline.encoder"}
    while todo:
        name = todo.pop()
        seen.add(name)
        file = HOME / (name.replace(".", "/") + ".py")
        todo |= {
            found
            for found in imports(file)
            if found.startswith("pipeline.") and (HOME / (found.replace(".", "/") + ".py")).is_file()
        } - seen
    assert {name for name in seen if not name.startswith("pipeline.encoding.")} == ENCODER_NEEDS


def test_package_init_imports_nothing_heavy() -> None:
    assert imports(HOME / "pipeline" / "__init__.py", top_level=True) == {"typing", "typing.TYPE_CHECKING"}


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(HOME)))
def test_files_stay_small(file: Path) -> None:
    text = file.read_text()
    assert text.count("\n") <= 300
    assert file.stem not in {"utils", "helpers", "common", "misc", "base"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno <= 60, f"{node.name} is too long"


def test_import_names_belong_to_vecmill_alone() -> None:
    owners = importlib.metadata.packages_distributions()
    for name in ("pipeline", "jobs"):
        assert {owner.lower() for owner in owners.get(name, ["vecmill"])} == {"vecmill"}


def test_no_pickle_and_no_eval() -> None:
    for file in SOURCES:
        names = imports(file)
        assert not names & {"pickle", "cloudpickle", "dill", "joblib"}, file
        calls = {
            node.func.id
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not calls & {"eval", "exec"}, file
