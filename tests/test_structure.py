"""The house: imports point down only, and the three folders are one package."""

from __future__ import annotations

import ast
import importlib
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each may import those before it.
GROUND_FLOOR = ("torch_internals", "checks", "registry", "policy", "config", "ops", "report")
FLOORS = {"block_masks": (), "passes": ("block_masks",)}


def imported_rooms(file: Path) -> set[str]:
    """Return the second part of each of our own modules that a file imports."""
    nodes = ast.walk(ast.parse(file.read_text()))
    modules = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {module.split(".")[1] for module in modules if module.startswith("flexprefill_compile.")}


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_point_down_only(floor: str) -> None:
    for file in (ROOT / floor).glob("*.py"):
        assert imported_rooms(file) <= {floor, *FLOORS[floor], *GROUND_FLOOR}, file.name


def test_the_ground_floor_stands_on_nothing() -> None:
    for number, name in enumerate(GROUND_FLOOR):
        assert imported_rooms(ROOT / "flexprefill_compile" / f"{name}.py") <= {*GROUND_FLOOR[:number]}, name


def test_only_one_file_imports_private_names_of_torch() -> None:
    for file in [
        *(ROOT / "flexprefill_compile").rglob("*.py"),
        *(ROOT / "passes").glob("*.py"),
        *(ROOT / "block_masks").glob("*.py"),
    ]:
        if file.name == "torch_internals.py":
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
    for folder in ("flexprefill_compile", "passes", "block_masks"):
        for file in (ROOT / folder).rglob("*.py"):
            assert "block_masks.reference" not in file.read_text(), file.name


def test_every_folder_of_the_package_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {
        f"flexprefill_compile.{file.parent.name}" for file in (ROOT / "flexprefill_compile").glob("*/__init__.py")
    }
    assert set(listed) == folders | {"flexprefill_compile", *(f"flexprefill_compile.{floor}" for floor in FLOORS)}


def test_what_measures_quality_stands_on_the_compiler_and_not_the_other_way_round() -> None:
    users = {file.stem for file in (ROOT / "flexprefill_compile").glob("*.py") if "quality" in imported_rooms(file)}
    assert "__init__" in users
    assert users.isdisjoint({*GROUND_FLOOR, "backend", "crossing", "decorator", "explain"})
    assert (ROOT / "flexprefill_compile" / "quality").is_dir()
