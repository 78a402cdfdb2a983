"""The recipes of CONTRIBUTING.md, followed word for word in a copy of the package, give what they promise."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "flexprefill_compile"

USE_THE_ESTIMATOR = """
import torch
from helpers.checked_attention import without_code_generation
from flexprefill_compile.block_masks import record_densities

@torch.compile(backend="flexprefill", options={
    "estimator": "means", "gamma": 0.5, "min_budget": 0, "min_length": 1, "block_size": 32
})
def attend(query, key, value, mask):
    causal = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    return causal, torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)

positions = torch.arange(256)
window = (positions <= positions[:, None]) & (positions > positions[:, None] - 100)
with torch.no_grad(), without_code_generation(is_dense=False), record_densities() as densities:
    for output in attend(*torch.randn(3, 1, 2, 256, 32), window):
        assert output.isfinite().all()
print(len(densities), "sparse calls", all((density < 1).all() for density in densities))
"""
RUN_THE_COMMAND = """
from flexprefill_compile.commands.cli import main

assert main(["where", "--device", "cpu"]) == 0
main(["--help"])
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the sources, each folder under the name of its package."""
    for folder in (PACKAGE, "passes", "block_masks"):
        inside = "" if folder == PACKAGE else folder
        shutil.copytree(
            ROOT / folder, tmp_path / PACKAGE / inside, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("*.png"))
    return tmp_path


def follow(recipe: str, copy: Path) -> None:
    """Write the files and apply the changes that a section of CONTRIBUTING.md shows."""
    sections = re.split(r"^## ", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    (section,) = [section for section in sections if section.startswith(f"{recipe}\n")]
    blocks = re.findall(r"^   ```(\w+)\n(.*?)^   ```", section, re.MULTILINE | re.DOTALL)
    assert blocks
    for kind, indented in blocks:
        name, _, text = textwrap.dedent(indented).removeprefix("# ").partition("\n")
        file = copy / (name if name.startswith((PACKAGE, "docs")) else f"{PACKAGE}/{name}")
        if kind == "diff":
            assert file.exists(), name
            file.write_text(apply(text, file.read_text()))
        else:
            assert not file.exists(), name
            file.write_text(text)


def apply(diff: str, text: str) -> str:
    """Return a text after a diff of which every line but the new ones occurs exactly once, in order."""
    lines, place = text.splitlines(), 0
    for line in diff.splitlines():
        if line == "...":
            continue
        if line.startswith("+"):
            lines.insert(place, line[1:])
            place += 1
            continue
        assert lines.count(line[1:]) == 1, f"the recipe names a line that is not there: {line[1:]}"
        found = lines.index(line[1:])
        assert found >= place
        if line.startswith("-"):
            del lines[found]
        place = found + (not line.startswith("-"))
    return "\n".join(lines) + "\n"


def run(copy: Path, program: str) -> str:
    """Run a program that sees the copy and not the checkout, and return what it prints."""
    (copy / "program.py").write_text(program)
    result = subprocess.run(
        [sys.executable, "program.py"],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": f"{copy}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_recipe_for_an_estimator(copy: Path) -> None:
    follow("Add an estimator", copy)
    assert run(copy, USE_THE_ESTIMATOR) == "2 sparse calls True\n"
    assert "| `means` |" in (copy / "docs" / "estimators.md").read_text()


def test_the_recipe_for_a_command(copy: Path) -> None:
    follow("Add a command", copy)
    printed = run(copy, RUN_THE_COMMAND)
    assert re.match(r"cpu: \d+ tokens\n", printed)
    assert "print the break-even length" in printed


def test_a_recipe_that_is_out_of_date_fails() -> None:
    assert apply(" a\n+b\n...\n-d\n+e\n", "a\nc\nd\n") == "a\nb\nc\ne\n"
    with pytest.raises(AssertionError, match="names a line that is not there"):
        apply(" x\n+b\n", "a\nc\n")
