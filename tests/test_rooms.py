"""The rooms of the package import downwards only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import vitviz

PACKAGE = Path(vitviz.__file__).parent

# A room may import only rooms named before it.
ORDER = (
    *(
        "errors",
        "options",
        "streaming",
        "capture",
        "trace",
        "propagation",
        "linearization",
        "refinement",
        "sanity",
        "layout",
        "labels",
        "weights",
    ),
    *("building", "models", "support", "images", "render", "explanation", "outputs"),
    *("lanes", "engine", "ledger", "pipeline"),
    *("metrics", "perturbation", "annotations", "examination", "evaluation", "chart", "exhibits"),
    *("api", "anatomy", "console", "scoreboard", "reporting", "cli", "__main__"),
)
ROOMS = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
TORCHLESS = (
    *("errors", "options", "labels", "images", "render", "explanation", "outputs"),
    *("metrics", "annotations", "chart", "cli"),
)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _imports(room: str, *, lazy: bool = True) -> set[str]:
    """List the modules that a room imports, anywhere or (not lazy) while it is imported."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if room == "cli" and _is_type_checking(node):
            return
        if not lazy and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{room} imports relatively"
            assert node.module
            if node.module == "vitviz":
                found.update(f"vitviz.{alias.name}" for alias in node.names)
            else:
                found.add(node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse((PACKAGE / f"{room}.py").read_text(encoding="utf-8")))
    return found


def _rooms_used(room: str) -> set[str]:
    used = {name.split(".")[1] for name in _imports(room) if name.startswith("vitviz.")}
    return used & set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_a_place(room: str) -> None:
    assert room in ORDER


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_only_rooms_above_it(room: str) -> None:
    above = set(ORDER[: ORDER.index(room)])
    assert _rooms_used(room) <= above, f"{room} imports {_rooms_used(room) - above}"


def test_no_room_hides_its_imports_from_the_type_checker() -> None:
    for room in ROOMS:
        tree = ast.parse((PACKAGE / f"{room}.py").read_text(encoding="utf-8"))
        hidden = [node for node in ast.walk(tree) if _is_type_checking(node)]
        assert room == "cli" or not hidden, room


@pytest.mark.parametrize("room", TORCHLESS)
def test_room_loads_no_torch(room: str) -> None:
    pending, seen = [room], set()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        names = _imports(current, lazy=False)
        heavy = {name for name in names if name.split(".")[0] in ("torch", "timm")}
        assert not heavy, f"{room} → {current} imports {heavy}"
        pending += [
            name.split(".")[1]
            for name in names
            if name.startswith("vitviz.") and name.split(".")[1] in ROOMS
        ]


def test_package_itself_imports_no_room() -> None:
    assert not {name for name in _imports("__init__") if name.startswith("vitviz")}


def test_only_cli_and_reporting_and_console_print_or_leave() -> None:
    for room in set(ROOMS) - {"cli", "console", "scoreboard", "reporting", "__main__"}:
        names = _imports(room)
        assert not names & {"rich", "typer", "click"}, room
        tree = ast.parse((PACKAGE / f"{room}.py").read_text(encoding="utf-8"))
        calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not {"print", "sys.exit", "exit", "quit"} & set(calls), room


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "__main__"])
def test_every_public_name_of_a_room_is_there(room: str) -> None:
    module = __import__(f"vitviz.{room}", fromlist=["__all__"])
    for name in module.__all__:
        assert hasattr(module, name), name


def test_every_public_name_of_the_package_is_there() -> None:
    for name in vitviz.__all__:
        assert getattr(vitviz, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = vitviz.nothing_of_the_kind


def test_package_lists_its_public_names_before_they_are_loaded() -> None:
    assert dir(vitviz) == sorted(vitviz.__all__)
