"""``flexprefill evaluate``: dense beside sparse, and one sentence for each mistake."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers.tiny_model import save_tiny_model

from flexprefill_compile.commands.cli import main


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def test_the_command_prints_dense_beside_sparse(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    arguments = ["--model", str(model_folder), "--lengths", "1200", "--samples", "3", "--tasks", "needle", "code"]
    settings = ["--gamma", "0.5", "--min-budget", "0", "--json", str(file)]
    assert main(["evaluate", *arguments, *settings]) == 0
    output = capsys.readouterr().out
    for task in ("needle", "code"):
        assert re.search(rf"^{task} +1200 +pooled( +-\d\.\d+){{2}} +[+-]\d\.\d+ .*%", output, re.MULTILINE)
    assert re.search(r"^pooled: worse than dense on \d of 2", output, re.MULTILINE)
    assert f"wrote {file}\n" in output
    figures = json.loads(file.read_text())
    assert figures["settings"]["configs"]["pooled"]["gamma"] == 0.5
    for comparison in figures["comparisons"]:
        assert len(comparison["dense"]) == len(comparison["sparse"]) == 3
        assert 0 < comparison["density"] < 1
        assert comparison["interval"][0] <= comparison["difference"] <= comparison["interval"][1]
    assert figures["comparisons"][0]["depths"] == [0, 0.5, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "chess"], r"task must be one of needle, .*, got 'chess'"),
        (["--lengths", "300"], r"length must be at least 384 tokens, two blocks of 128 and 128 .*, got 300"),
        (["--lengths", "4096"], r"length must be at most the 2048 tokens that the model takes, got 4096"),
        (
            ["--tasks", "copy", "--lengths", "390", "--min-budget", "0"],
            r"length must be at least \d+ tokens for the task copy, got 390",
        ),
        (["--estimators", "crystal_ball"], r"estimator must be one of .*, got 'crystal_ball'"),
        (["--gamma", "2"], r"gamma must be in \(0, 1\], got 2.0"),
    ],
)
def test_a_mistake_gives_one_sentence(
    arguments: list[str], message: str, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--model", str(model_folder), "--lengths", "1200", *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("flexprefill: ")]
    assert re.fullmatch(f"flexprefill: error: {message}", line)
