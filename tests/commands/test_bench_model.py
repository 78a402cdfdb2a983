"""``flexprefill bench-model`` at sizes for a CPU."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers.command_line import one_sentence

from flexprefill_compile.commands.bench_model import choose_budget
from flexprefill_compile.commands.cli import main

SHAPE = ["--device", "cpu", "--heads", "4", "2"]


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5])
def test_the_budget_gives_the_density(density: float) -> None:
    num_blocks = 256
    width = choose_budget(num_blocks * 128, density, 128) // 128 + 2
    computed = sum(min(row, width) for row in range(1, num_blocks + 1))
    assert computed / (num_blocks * (num_blocks + 1) / 2) == pytest.approx(density, abs=0.01)


def test_a_model_to_its_first_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--layers", "2", "--hidden", "64", "--intermediate", "96", "--vocabulary", "50"]
    figures = tmp_path / "model.json"
    arguments = ["--lengths", "1100", "--density", "0.5", "--json", str(figures)]
    assert main(["bench-model", *SHAPE, *sizes, *arguments]) == 0
    (run,) = json.loads(figures.read_text())
    assert run["density"] == pytest.approx(0.5, abs=0.15)
    assert min(run["dense_ms"], run["sparse_ms"]) > 0
    assert re.search(r"^1100 +\d+% +\d+ ms \(flash\) ", capsys.readouterr().out, re.MULTILINE)


def test_a_density_out_of_range_gets_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench-model", *SHAPE, "--density", "0"]) == 2
    assert one_sentence(capsys) == "density must be in (0, 1], got 0.0"
