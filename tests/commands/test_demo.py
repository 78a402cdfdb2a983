"""``flexprefill demo`` on a tiny model."""

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
    arguments += ["--block-size", "32", "--min-budget", "32"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "text.txt: 300 tokens" in output
    assert re.search(r"attention calls rewritten\s+2 of 2", output)
    for row in ("prefill", "compile", "perplexity", "top-1 agreement", "blocks computed, by layer"):
        assert re.search(rf"^{row}\s.*\d", output, re.MULTILINE), row
    assert "dense goes on:" in output
    assert "sparse goes on:" in output


def test_a_text_that_turns_out_too_short_is_refused_before_the_first_prefill(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text(TEXT[:400])
    monkeypatch.setattr("torch.compile", lambda *_, **__: pytest.fail("the run has begun"))
    assert main(["demo", "--model", str(model_folder), "--text", str(tmp_path / "text.txt")]) == 2
    assert re.match(r"(min_budget 768 computes every block|the text must be of two blocks)", one_sentence(capsys))


def test_the_demo_says_why_attention_stayed_dense() -> None:
    shapes = AttentionShapes("1x4x300x16", "1x2x300x16", "float32")
    report = RewriteReport((Skipped("model.layers.0", shapes, SkipReason.NOT_CAUSAL),) * 2)
    dense, sparse = (
        Prefill(abs, first_s=2.0, times_s=[0.5], loss=1.0, predictions=torch.tensor([1, 2])) for _ in range(2)
    )
    summary = summarise(dense, sparse, report)
    assert "left dense, 2 of 2: not causal" in summary
    assert re.search(r"prefill\s+500.0 ms\s+500.0 ms\s+1.00x faster", summary)
    sparse.times_s = [0.65]
    assert re.search(r"prefill\s+500.0 ms\s+650.0 ms\s+1.30x slower", summarise(dense, sparse, report))
