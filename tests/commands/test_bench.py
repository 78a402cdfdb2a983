"""``flexprefill bench`` at sizes for a CPU: what it writes, and that it is true."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_line import one_sentence

from flexprefill_compile.bench.inputs.saved import load_inputs
from flexprefill_compile.commands import bench as bench_command
from flexprefill_compile.commands.cli import main

SHAPE = ["--device", "cpu", "--heads", "4", "2"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """Run it once: its JSON, its output and its plot."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "peers.py").write_text("from helpers.models import causal_attention as attend\n")
    patch, lines = pytest.MonkeyPatch(), []
    patch.syspath_prepend(str(folder))
    patch.setattr("builtins.print", lambda *parts: lines.append(" ".join(parts)))
    files = ["--json", str(folder / "figures.json"), "--plot", str(folder / "figures.png")]
    what = ["--inputs", "structured", "rotary", "--lengths", "1000", "--min-budget", "0", "--calls", "2"]
    more = ["--head-dim", "32", "--max-budget", "512", "--max-density", "0.6", "--peer", "peers:attend"]
    try:
        assert main(["bench", *SHAPE, *what, *more, *files]) == 0
    finally:
        patch.undo()
    return json.loads((folder / "figures.json").read_text()), "\n".join(lines), folder / "figures.png"


def test_every_kind_of_inputs_has_its_figures(bench: tuple[dict[str, Any], str, Path]) -> None:
    figures, output, plot = bench
    assert [run["inputs"] for run in figures["runs"]] == ["structured", "rotary"]
    for run in figures["runs"]:
        times = [*run["dense_ms"].values(), *(run[f"{name}_ms"] for name in ("dense_flex", "selection", "sparse"))]
        assert min(times) > 0
        assert 0 < run["density"] < 1
        assert run["recall"]["worst"] <= run["recall"]["mean"] <= 1.001
        assert 0 <= run["error"] < 1
        assert run["floors_ms"]["flex_attention"] > 0
        assert run["peers"]["peers:attend"]["error"] < 1e-5
        assert min(run["ceiling"].values()) > 0
        assert re.search(rf"^1000 +{run['inputs']} ", output, re.MULTILINE)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_row_without_memory_gets_a_note(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 1 EiB. More words")

    monkeypatch.setattr(bench_command, "measure_layer", fail)
    monkeypatch.setattr(bench_command, "measure_rates", lambda *_: {"copy": 1.0, "product": 1.0})
    assert main(["bench", *SHAPE, "--head-dim", "16", "--lengths", "64", "--inputs", "random"]) == 0
    assert "64 random: out of memory: Tried to allocate 1 EiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--device", "abacus"], "device must be cpu or cuda"),
        (["bench", "--device", "cpu", "--heads", "3", "2"], "query heads must be a multiple"),
        (["bench", *SHAPE, "--peer", "no_such_module:f"], "peer must be module:function"),
        (["bench", *SHAPE, "--peer", "math:pi"], "peer must be module:function, got 'math:pi', which is a float"),
        (["bench", *SHAPE, "--max-density", "2"], "max_density must be None or a share"),
    ],
)
def test_mistakes_get_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert one_sentence(capsys).startswith(message)


def test_saved_inputs_are_timed_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "inputs.pt"
    saved = [torch.randn(1, heads, 700, 16, dtype=torch.bfloat16) for heads in (4, 2, 2)]
    torch.save(tuple(saved), path)
    loaded = load_inputs(path, 600, "cpu", torch.float32)
    assert all(torch.equal(a, b[:, :, :600].float()) for a, b in zip(loaded, saved, strict=True))
    arguments = ["--inputs", "--saved", str(path), "--lengths", "600", "701", "--min-budget", "0", "--calls", "2"]
    assert main(["bench", "--device", "cpu", *arguments]) == 0
    output = capsys.readouterr().out
    assert re.search(r"^600 +saved +\d", output, re.MULTILINE)
    assert "701 saved: " in output
    assert "has 700 tokens, got a length of 701" in output


def test_a_row_that_stays_dense_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--head-dim", "16", "--lengths", "200", "--inputs", "random", "--calls", "2"]
    assert main(["bench", *SHAPE, *arguments, "--kernel-backend", "flash"]) == 0
    assert "flash, which doesn't fit (device cpu)" in capsys.readouterr().out
