"""``flexprefill audit``: a table, files, and one sentence for each mistake."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from helpers.command_line import one_sentence

from flexprefill_compile import AuditReport
from flexprefill_compile.commands.cli import main


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("Everyone is permitted to copy and distribute verbatim copies of this license document.\n" * 20)
    return file


def test_the_command_prints_a_table_and_writes_files(
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["audit", "--model", str(model_folder), "--text", str(text_file), "--tokens", "300"]
    selection = ["--gamma", "0.8", "--min-budget", "0", "--block-size", "32", "--estimator", "flexprefill"]
    outputs = ["--rows", "16", "--json", str(tmp_path / "audit.json"), "--plots", str(tmp_path / "plots")]
    assert main([*arguments, *selection, *outputs]) == 0
    printed = capsys.readouterr().out
    written = AuditReport.from_json((tmp_path / "audit.json").read_text())
    assert "text.txt: 300 tokens" in printed
    assert str(written) in printed
    assert written.options["gamma"] == 0.8
    assert math.isfinite(written.predictions.perplexity_ratio)
    assert (tmp_path / "plots" / "heads.png").exists()


def test_the_command_gives_one_sentence_for_each_mistake(
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["audit", "--model", str(model_folder), "--text", str(text_file)]
    mistakes = {
        ("--tokens", "200"): "the text must be of two blocks at least, 256 tokens, got 200",
        ("--gamma", "2"): "gamma must be in (0, 1], got 2.0",
        ("--estimator", "guess"): "estimator must be ",
        ("--json", "/nowhere/audit.json"): "can't write /nowhere/audit.json: there is no folder /nowhere",
    }
    for mistake, message in mistakes.items():
        assert main([*arguments, *mistake]) == 2
        assert one_sentence(capsys).startswith(message)


def test_plots_without_matplotlib_are_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("the model is loaded before matplotlib is looked for")

    monkeypatch.setattr("flexprefill_compile.models.load_model", fail)
    monkeypatch.delitem(sys.modules, "flexprefill_compile.quality.audit.plots", raising=False)
    for name in ("matplotlib", "matplotlib.backends", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["audit", "--plots", str(tmp_path / "plots")]) == 2
    sentence = one_sentence(capsys)
    assert sentence.startswith("plots need matplotlib")
    assert sentence.endswith("of the extra 'plot': pip install 'flexprefill-compile[plot]'")
