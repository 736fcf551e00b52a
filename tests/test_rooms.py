"""The house: folders and rooms import downwards only, and each loads no more than it needs."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import vitviz
from vitviz.methods.table import METHODS

PACKAGE = Path(vitviz.__file__).parent

# A floor may import only floors named before it.
FLOORS = (
    *("errors", "options", "streaming", "models", "images", "methods", "pictures", "explaining"),
    *(
        "inspection",
        "runs",
        "report",
        "evaluation",
        "python_words",
        "python_values",
        "api",
        "comparing_api",
        "features_api",
        "cli",
        "__main__",
    ),
)
ROOMS = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
)
TORCHLESS = (
    *("errors", "options", "models.census", "models.labels", "images.sources", "images.samples"),
    *(
        "pictures.heat",
        "pictures.sheets",
        "explaining.explanation",
        "explaining.grids",
        "runs.names",
    ),
    *("runs.provenance", "runs.writing"),
    *(
        "methods.table",
        "runs.cluster",
        "runs.job",
        "runs.shards",
        "runs.tables",
        "images.stores",
        "images.archives",
        "images.lists",
        "evaluation.options",
        "cli.options",
        "cli.evaluation_options",
        "cli.parameters",
        "cli.explaining",
    ),
    *("cli.evaluating", "cli.features", "cli.starting", "methods.features"),
    *("cli.comparing", "methods.comparison"),
    *("evaluation.metrics", "evaluation.annotations", "evaluation.plot", "cli.app"),
    *("report.sink", "report.page"),
)
LONGEST_FILE, LONGEST_FUNCTION, MEDIAN_FUNCTION = 400, 50, 10


def _path(room: str) -> Path:
    path = PACKAGE.joinpath(*room.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def _tree(room: str) -> ast.Module:
    return ast.parse(_path(room).read_text(encoding="utf-8"))


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _imports(room: str, *, lazy: bool = True) -> set[str]:
    """List the modules that a room imports, anywhere or (not lazy) while it is imported."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if not lazy and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if not lazy and _is_type_checking(node):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{room} imports relatively"
            assert node.module
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(_tree(room))
    return found


def _rooms_used(room: str, *, lazy: bool = True) -> set[str]:
    names = {name.removeprefix("vitviz.") for name in _imports(room, lazy=lazy)}
    return names & set(ROOMS) - {room}


def _floor(room: str) -> str:
    return room.partition(".")[0]


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_is_on_a_floor(room: str) -> None:
    assert _floor(room) in FLOORS


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_only_its_own_floor_and_those_below(room: str) -> None:
    below = set(FLOORS[: FLOORS.index(_floor(room)) + 1])
    used = {other for other in _rooms_used(room) if _floor(other) not in below}
    assert not used, f"{room} imports {used}"


def test_rooms_of_a_floor_import_each_other_in_one_direction() -> None:
    done: set[str] = set()
    pending = {room: _rooms_used(room) for room in ROOMS}
    while pending:
        free = [room for room, used in pending.items() if used <= done]
        assert free, f"a circle of imports among {sorted(pending)}"
        done.update(free)
        for room in free:
            del pending[room]


def test_explaining_commands_need_no_inspection_and_no_evaluation() -> None:
    reached, pending = set[str](), {"cli.explaining"} | _rooms_used("cli.app", lazy=False)
    while pending:
        reached |= pending
        pending = {used for room in pending for used in _rooms_used(room)} - reached
    assert {"methods.relevance", "runs.pipeline", "cli.reporter"} <= reached
    assert not {room for room in reached if _floor(room) in ("inspection", "evaluation")}


def test_report_is_imported_where_it_is_asked_for_alone() -> None:
    """A run without a report loads nothing of it, nor does the program to find its commands."""
    for room in ROOMS:
        if _floor(room) not in ("report", "cli"):
            assert not {used for used in _rooms_used(room) if _floor(used) == "report"}, room
        if _floor(room) == "cli":
            used = _rooms_used(room, lazy=False)
            assert not {each for each in used if _floor(each) == "report"}, room


@pytest.mark.parametrize("floor", [floor for floor in FLOORS if (PACKAGE / floor).is_dir()])
def test_folder_says_what_it_holds_and_what_it_never_does(floor: str) -> None:
    text = ast.get_docstring(_tree(floor)) or ""
    assert "never" in text.splitlines()[0] or "nothing" in text.splitlines()[0], text


@pytest.mark.parametrize("room", ROOMS)
def test_room_says_what_it_holds(room: str) -> None:
    assert ast.get_docstring(_tree(room))


def test_imports_for_the_type_checker_alone_are_only_where_torch_must_wait() -> None:
    for room in ROOMS:
        hidden = [node for node in ast.walk(_tree(room)) if _is_type_checking(node)]
        assert _floor(room) in ("cli", "methods") or not hidden, room


def test_words_of_methods_are_named_in_their_own_rooms_alone() -> None:
    """A method is one object: no branch elsewhere asks which one it is."""
    words, classes = set(METHODS), {each.__name__ for each in METHODS.values()}
    for room in ROOMS:
        if _floor(room) == "methods":
            continue
        for node in ast.walk(_tree(room)):
            if isinstance(node, (ast.If, ast.IfExp, ast.While, ast.Match)):
                asked = node.subject if isinstance(node, ast.Match) else node.test
                nodes = list(ast.walk(asked))
                typed = {str(each.value) for each in nodes if isinstance(each, ast.Constant)}
                named = {each.id for each in nodes if isinstance(each, ast.Name)}
                assert not typed & words and not named & classes, f"{room}:{node.lineno}"


@pytest.mark.parametrize("room", TORCHLESS)
def test_room_loads_no_torch(room: str) -> None:
    pending, seen = [room], set()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        heavy = {name.split(".")[0] for name in _imports(current, lazy=False)} & {"torch", "timm"}
        assert not heavy, f"{room} → {current} imports {heavy}"
        pending += _rooms_used(current, lazy=False)


def test_package_itself_imports_no_room() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    imported = [ast.unparse(node) for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert not [text for text in imported if "vitviz" in text]


def test_only_the_command_line_prints_or_leaves() -> None:
    for room in ROOMS:
        if _floor(room) in ("cli", "__main__"):
            continue
        tops = {name.split(".")[0] for name in _imports(room)}
        assert not tops & {"rich", "typer", "click"}, room
        calls = [node for node in ast.walk(_tree(room)) if isinstance(node, ast.Call)]
        names = {ast.unparse(node.func) for node in calls}
        assert not {"print", "sys.exit", "exit", "quit"} & names, room


@pytest.mark.parametrize("room", ROOMS)
def test_no_file_is_too_long_to_read(room: str) -> None:
    length = len(_path(room).read_text(encoding="utf-8").splitlines())
    assert length <= LONGEST_FILE


def test_functions_are_short() -> None:
    lengths = {
        f"{room}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for room in ROOMS
        for node in ast.walk(_tree(room))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    long = {name for name, length in lengths.items() if length > LONGEST_FUNCTION}
    assert not long
    assert sorted(lengths.values())[len(lengths) // 2] <= MEDIAN_FUNCTION


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "__main__"])
def test_every_public_name_of_a_room_is_there(room: str) -> None:
    module = __import__(f"vitviz.{room}", fromlist=["__all__"])
    for name in getattr(module, "__all__", ()):
        assert hasattr(module, name), name


def test_every_public_name_of_the_package_is_there() -> None:
    for name in vitviz.__all__:
        assert getattr(vitviz, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = vitviz.nothing_of_the_kind


def test_package_lists_its_public_names_before_they_are_loaded() -> None:
    assert dir(vitviz) == sorted(vitviz.__all__)
