"""The house: one package out of three folders, small rooms, imports that point down only, and no circles."""

from __future__ import annotations

import ast
import importlib
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "flexprefill_compile"
FOLDERS = (PACKAGE, "passes", "block_masks")
MOST_FILES, MOST_LINES = 12, 300

# Each may import those after it, and nothing before it.
FLOORS = (
    ("__main__",),
    ("commands",),
    ("__init__",),
    ("quality", "tasks", "bench", "models"),
    ("decorator", "explain", "integrations", "deployment"),
    ("backend",),
    ("passes",),
    ("block_masks",),
    ("ops",),
    ("report", "devices", "parallel"),
    ("errors",),
    ("text_table",),
    ("settings",),
    ("torch_internals",),
)


def list_modules() -> dict[str, Path]:
    """Return each of our modules, by its name without the package's."""
    modules = {}
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            parts = parts[1:] if folder == PACKAGE else parts
            name = ".".join(parts)
            modules[name.removesuffix(".__init__") if name != "__init__" else name] = file
    return modules


MODULES = list_modules()


def find_imports(module: str) -> set[str]:
    """Return the modules of ours that a module imports, lazily and for types alone too."""
    file = MODULES[module]
    if module == "__init__":
        package: list[str] = []
    else:
        package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith(PACKAGE) for alias in node.names), f"{file}: use from ... import"
        if not isinstance(node, ast.ImportFrom):
            continue
        base = resolve(node, package)
        if base is None:
            continue
        for alias in node.names:
            submodule = f"{base}.{alias.name}" if base else alias.name
            found.add(submodule if submodule in MODULES else base or "__init__")
    return found - {module}


def resolve(node: ast.ImportFrom, package: list[str]) -> str | None:
    """Return the module of an import, without the package's name; None if it isn't ours."""
    if node.level:
        kept = package[: len(package) - node.level + 1]
        return ".".join([*kept, *(node.module or "").split(".")]).strip(".")
    name = node.module or ""
    return name.removeprefix(PACKAGE).strip(".") if name.split(".")[0] == PACKAGE else None


IMPORTS = {module: find_imports(module) for module in MODULES}


def floor_of(module: str) -> int:
    room = module.split(".", maxsplit=1)[0]
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def test_every_module_has_a_floor_and_imports_point_down_only() -> None:
    wrong = {
        f"{module} -> {imported}"
        for module, all_imported in IMPORTS.items()
        for imported in all_imported
        if floor_of(imported) < floor_of(module)
    }
    assert not wrong


def find_circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return a circle of each strongly connected component, found by depth-first search."""
    state: dict[str, int] = {}
    circles = []

    def visit(node: str, path: list[str]) -> None:
        state[node] = 1
        for following in sorted(edges.get(node, ())):
            if state.get(following) == 1:
                circles.append([*path[path.index(following) :], following])
            elif following not in state:
                visit(following, [*path, following])
        state[node] = 2

    for node in sorted(edges):
        if node not in state:
            visit(node, [node])
    return circles


def test_there_is_no_circle_of_modules() -> None:
    assert find_circles(IMPORTS) == []


def test_there_is_no_circle_of_rooms() -> None:
    """Folders side by side depend on each other in one direction only."""

    def room_of(module: str) -> str:
        parts = module.split(".")
        is_package = MODULES[module].name == "__init__.py"
        return ".".join(parts if is_package else parts[:-1]) or "front door"

    rooms: dict[str, set[str]] = {}
    for module, all_imported in IMPORTS.items():
        for imported in all_imported:
            a, b = room_of(module), room_of(imported)
            related = a == b or a.startswith(f"{b}.") or b.startswith(f"{a}.") or "front door" in (a, b)
            if not related:
                rooms.setdefault(a, set()).add(b)
    assert find_circles(rooms) == []


def test_a_circle_is_found_through_relative_imports() -> None:
    assert find_circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == [["a", "b", "c", "a"]]
    (node,) = ast.parse("from ..match import site").body
    assert isinstance(node, ast.ImportFrom)
    assert resolve(node, ["passes", "lift"]) == "passes.match"


@pytest.mark.parametrize("folder", [*FOLDERS, "tests"])
def test_rooms_and_files_stay_small(folder: str) -> None:
    files = list((ROOT / folder).rglob("*.py"))
    rooms = {file.parent for file in files}
    crowded = [str(room) for room in rooms if len(list(room.glob("*.py"))) > MOST_FILES]
    assert not crowded
    long = [str(file) for file in files if len(file.read_text().splitlines()) > MOST_LINES]
    assert not long


def test_imports_are_relative_inside_a_floor_and_absolute_between_floors() -> None:
    for module, file in MODULES.items():
        floor = module.split(".")[0] if module.split(".")[0] in FOLDERS else PACKAGE
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
                room = [*(node.module or "").split("."), ""][1]
                names = {alias.name for alias in node.names} if not room else {room}
                rooms = {name if name in FOLDERS else PACKAGE for name in names}
                assert floor not in rooms, f"{file.name}: {ast.unparse(node)}"


def test_every_room_states_its_law() -> None:
    for file in [file for file in MODULES.values() if file.name == "__init__.py"]:
        assert ast.get_docstring(ast.parse(file.read_text())), file


def test_only_one_folder_imports_private_names_of_torch() -> None:
    for module, file in MODULES.items():
        if module.split(".")[0] == "torch_internals":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                path = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                private = [part for part in path if part.startswith("_") and part != "_pytree"]
                assert not private, f"{file.name} imports {node.module}"


@pytest.mark.parametrize("folder", ["passes", "block_masks"])
def test_a_folder_can_not_be_imported_by_its_bare_name(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(ImportError, match=f"import flexprefill_compile.{folder}"):
        importlib.import_module(folder)
    assert folder not in sys.modules


def test_only_tests_import_the_oracle() -> None:
    for module, imported in IMPORTS.items():
        assert not any(name.endswith("reference") for name in imported), module


def test_every_folder_of_the_package_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    rooms = {name for name, file in MODULES.items() if file.name == "__init__.py"} - {"__init__"}
    assert sorted(listed) == sorted([PACKAGE, *(f"{PACKAGE}.{room}" for room in rooms)])
