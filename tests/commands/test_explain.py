"""``flexprefill explain``: the attention calls of a model on a text."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexprefill_compile.commands.cli import main


@pytest.fixture
def arguments(model_folder: Path, tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("Everyone is permitted to copy and distribute verbatim copies of this license document.\n" * 70)
    return ["explain", "--model", str(model_folder), "--text", str(text)]


def test_it_prints_a_line_for_each_call(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--tokens", "4224"]) == 0
    output = capsys.readouterr().out
    assert "text.txt: 4224 tokens, 0M parameters, cpu" in output
    assert "model.layers.1.self_attn" in output
    assert "2 of 2 attention calls rewritten" in output


def test_it_says_why_a_short_prompt_stays_dense(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--tokens", "300"]) == 0
    assert "dense: prompt shorter than min_length (300 < " in capsys.readouterr().out
