"""The command ``flexprefill``: the demo on a tiny model, and one sentence for each mistake."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers.command_line import one_sentence

from flexprefill_compile.commands.cli import main
from flexprefill_compile.commands.demo import Prefill, summarise
from flexprefill_compile.report import AttentionShapes, RewriteReport, Skipped, SkipReason

TEXT = "Everyone is permitted to copy and distribute verbatim copies of this license document.\n" * 20


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def test_the_demo_compares_dense_and_sparse(
    model_folder: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["demo", "--model", str(model_folder), "--text", str(text_file), "--tokens", "300", "--rounds", "1"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "text.txt: 300 tokens" in output
    assert re.search(r"attention calls rewritten\s+2 of 2", output)
    for row in ("prefill", "compile", "perplexity", "top-1 agreement", "blocks computed, by layer"):
        assert re.search(rf"^{row}\s.*\d", output, re.MULTILINE), row
    assert "dense goes on:" in output
    assert "sparse goes on:" in output


def test_the_demo_says_why_attention_stayed_dense() -> None:
    shapes = AttentionShapes("1x4x300x16", "1x2x300x16", "float32")
    report = RewriteReport((Skipped("model.layers.0", shapes, SkipReason.NOT_CAUSAL),) * 2)
    dense, sparse = (
        Prefill(abs, first_s=2.0, times_s=[0.5], loss=1.0, predictions=torch.tensor([1, 2])) for _ in range(2)
    )
    summary = summarise(dense, sparse, report)
    assert "left dense, 2 of 2: not causal" in summary
    assert re.search(r"prefill\s+500.0 ms\s+500.0 ms\s+1.00x faster", summary)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere"], "no model at /nowhere"),
        (["--gamma", "1.5"], "gamma must be in (0, 1], got 1.5"),
        (["--device", "cuda"], "device cuda is not available"),
        (["--device", "abacus"], "device must be cpu or cuda, got 'abacus'"),
    ],
)
def test_a_mistake_gives_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["demo", *arguments]) == 2
    assert one_sentence(capsys) == message


def test_a_folder_without_a_model_gives_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--model", str(tmp_path)]) == 2
    assert one_sentence(capsys).startswith(f"transformers finds no causal language model in {tmp_path}: ")


def test_a_missing_or_empty_text_gives_one_sentence(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    assert main(["demo", "--model", str(model_folder), "--text", str(text)]) == 2
    assert one_sentence(capsys).startswith(f"can't read the text {text}: ")
    text.write_text("a")
    assert main(["demo", "--model", str(model_folder), "--text", str(text)]) == 2
    assert one_sentence(capsys) == "text.txt is too short: 1 token"


@pytest.mark.parametrize("count", ["0", "-3", "many"])
def test_a_count_must_be_a_whole_number(count: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--tokens", count])
    assert stopped.value.code == 2
    assert f"must be a whole number above 0, got '{count}'" in capsys.readouterr().err


def test_without_the_extra_the_demo_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "flexprefill_compile.commands.demo", None)
    assert main(["demo"]) == 2
    assert "pip install 'flexprefill-compile[hf]'" in one_sentence(capsys)
