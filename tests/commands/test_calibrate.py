"""``flexprefill calibrate``: texts in, a policy out; one sentence for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.command_line import one_sentence

from flexprefill_compile.commands.cli import main
from flexprefill_compile.settings.policy import LayerPolicy, ModelShape, Policy

TEXT = "Everyone is permitted to copy and distribute verbatim copies of this license document.\n" * 4


def test_the_command_writes_a_policy_and_resumes(
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    output = tmp_path / "policy.json"
    arguments = ["calibrate", "--output", str(output), "--model", str(model_folder), "--block-size", "32"]
    arguments += ["--text", str(tmp_path / "text.txt"), "--tokens", "300", "--bound", "0.01", "--max-runs", "1"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "text.txt: 300 tokens" in printed
    assert "run 1: perplexity x" in printed
    assert "(bound x1.01) at density" in printed
    policy = Policy.load(output)
    assert policy.model.num_layers == 2
    assert main(arguments) == 0
    assert "run 1 (kept): perplexity x" in capsys.readouterr().out
    assert Policy.load(output) == policy


def test_a_mistake_gives_one_sentence(
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "policy.json"
    text.write_text(TEXT)
    arguments = ["calibrate", "--output", str(output), "--model", str(model_folder), "--text", str(text)]

    def sentence(*more: str) -> str:
        assert main([*arguments, *more]) == 2
        return one_sentence(capsys)

    assert sentence("--bound", "2") == "the bound must be in (0, 1), got 2.0"
    text.write_text(TEXT[:100])
    assert sentence().startswith(
        "text.txt must be of more than 384 tokens, of which min_budget 128 computes every block, got "
    )
    assert sentence("--estimator", "oracle").startswith("estimator must be one of ")
    Policy(ModelShape(architecture="GPT2LMHeadModel", num_layers=2, num_heads=4), {0: LayerPolicy()}).save(output)
    assert sentence() == (
        f"{output} is a policy for another model, GPT2LMHeadModel with 4 heads: choose another --output"
    )
    output.write_text("{}")
    assert sentence().startswith(f"{output} holds no policy: ")


def test_the_policy_has_a_name_by_default_and_runs_have_a_limit(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    arguments = ["calibrate", "--model", str(model_folder), "--block-size", "32", "--text", "text.txt"]
    assert main([*arguments, "--tokens", "300", "--max-runs", "4"]) == 0
    assert Policy.load(tmp_path / "policy.json").model.num_layers == 2
    runs = [line for line in capsys.readouterr().out.splitlines() if line.startswith("run ")]
    assert 1 <= len(runs) <= 4
