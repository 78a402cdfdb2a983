"""``flexprefill bench`` and ``bench-model`` at sizes for a CPU: what they write, and that it is true."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import causal_attention
from torch import Tensor

from flexprefill_compile.bench.inputs.inputs import create_inputs, create_rotary_inputs
from flexprefill_compile.bench.inputs.saved_inputs import load_inputs
from flexprefill_compile.bench.inputs.workloads import average_middle_half, time_dense_ms, time_in_turns_ms
from flexprefill_compile.bench.quality import measure_disagreement, measure_error, measure_recall
from flexprefill_compile.bench.rates import ATTENTION
from flexprefill_compile.bench.stages import SELECTION_STAGES
from flexprefill_compile.bench.tables import format_stages
from flexprefill_compile.block_masks.layout import create_causal_grid, pack_causal_blocks
from flexprefill_compile.block_masks.prefill import select_prefill_blocks
from flexprefill_compile.commands import bench as bench_run
from flexprefill_compile.commands.bench_model import choose_budget
from flexprefill_compile.commands.cli import main
from flexprefill_compile.errors import UsageError
from flexprefill_compile.settings.config import SparsePrefillConfig

SHAPE = ["--device", "cpu", "--heads", "4", "2"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """Run it once: its JSON, its output and its plot."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "peers.py").write_text("from models import causal_attention as attend\n")
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

    monkeypatch.setattr(bench_run, "measure", fail)
    monkeypatch.setattr(bench_run, "measure_rates", lambda *_: {"copy": 1.0, "product": 1.0})
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
        (["bench-model", *SHAPE, "--density", "0"], "density must be in (0, 1], got 0.0"),
    ],
)
def test_mistakes_get_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"flexprefill: error: {message}")


def test_recall_counts_what_is_kept() -> None:
    query, key = torch.zeros(1, 2, 256, 16), torch.zeros(1, 1, 256, 16)
    everything = create_causal_grid(4, query.device).expand(1, 2, -1, -1)
    whole = measure_recall(query, key, pack_causal_blocks(everything), 0.25, 64)
    assert whole["worst"] == pytest.approx(1)
    # Equal scores: of row i the diagonal block keeps (i % 64 + 1) / (i + 1).
    diagonal = measure_recall(query, key, pack_causal_blocks(everything & torch.eye(4, dtype=torch.bool)), 0.25, 64)
    rows = torch.randint(0, 256, (64,), generator=torch.Generator().manual_seed(0))
    assert diagonal["mean"] == pytest.approx(((rows % 64 + 1) / (rows + 1)).mean().item(), rel=1e-5)


def test_error_is_relative() -> None:
    exact = torch.randn(1, 3, 5, 7)
    assert measure_error(exact * 1.25, exact) == pytest.approx(0.25)


def test_rotary_heads_look_where_they_should() -> None:
    query, key, _ = create_rotary_inputs(5, 1, 1536, 64, "cpu", torch.float32)
    weights = (query[0, :, -1:] @ key[0].mT / 8).softmax(-1).squeeze(1)
    sink, _, topic, window, diagonal = weights
    assert sink.argmax() == 0
    assert topic[-512:].sum() > 0.9
    assert window[-128:].sum() > 0.7
    assert abs(int(diagonal.argmax()) - (1535 - 512)) <= 1


def test_real_inputs_are_what_a_layer_attends_over(tmp_path: Path) -> None:
    query, key, value = create_inputs("real", (1, 1), 200, 1, "cpu", torch.float32, None)
    assert query.shape == (1, 9, 200, 64)
    assert key.shape == value.shape == (1, 3, 200, 64)
    # A trained head's attention is no noise: the first key, its sink, draws more than its share.
    attended: Tensor = (query[0] @ key[0].repeat_interleave(3, 0).mT / 8)[:, -1].softmax(-1)
    assert attended[:, 0].mean() > 0.1
    assert causal_attention(query, key, value).isfinite().all()


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


@pytest.mark.parametrize("heads", [(4, 3, 3), (4, 2, 4)])
def test_saved_inputs_must_fit(tmp_path: Path, heads: tuple[int, int, int]) -> None:
    path = tmp_path / "inputs.pt"
    with pytest.raises(UsageError, match="must hold query, key and value: FileNotFoundError"):
        load_inputs(path, 8, "cpu", torch.float32)
    torch.save(tuple(torch.randn(1, count, 8, 16) for count in heads), path)
    with pytest.raises(UsageError, match=r"must hold \(1, H, S, D\) and twice \(1, Hkv, S, D\), got"):
        load_inputs(path, 8, "cpu", torch.float32)


def test_disagreement_counts_blocks() -> None:
    query, key, value = (torch.randn(1, heads, 700, 16) for heads in (2, 1, 1))
    config = SparsePrefillConfig(gamma=0.6, min_budget=0)
    blocks = select_prefill_blocks(query, key, value, 0.25, config)
    assert measure_disagreement(query, key, value, pack_causal_blocks(blocks), config) == 0
    other = blocks.clone()
    other[0, 0, 5, 2:4] ^= True
    expected = pytest.approx(2 / blocks.sum().item())
    assert measure_disagreement(query, key, value, pack_causal_blocks(other), config) == expected


def test_stages_stand_beside_their_floors() -> None:
    stages = dict.fromkeys(SELECTION_STAGES, 0.0) | {"pack_blocks": 0.25, ATTENTION: 3.0}
    run = {"tokens": 64, "inputs": "random", "stages_ms": stages, "floors_ms": {ATTENTION: 1.5}}
    table = format_stages([run | {"attention_flop_per_s": 4.2e14}, run])
    rows = [re.split(r" {2,}", line.rstrip()) for line in table.splitlines()[2:]]
    assert rows == [
        ["pack_blocks", "0.250", "0.250"],
        [ATTENTION, "3.000 (2.0x)", "3.000 (2.0x)"],
        ["that in TFLOP/s", "420"],
    ]


def test_memory_that_does_not_suffice_is_no_missing_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr("flexprefill_compile.bench.inputs.workloads.attend", fail)
    with pytest.raises(torch.OutOfMemoryError):
        time_dense_ms(*[torch.randn(1, 1, 8, 16)] * 3, 1)


def test_calls_take_turns_both_ways() -> None:
    order: list[int] = []
    first, second = time_in_turns_ms([lambda: order.append(0), lambda: order.append(1)], "cpu", 4)
    assert order == [0, 1, 0, 1] + [0, 1, 1, 0] * 2  # two rounds warm up
    assert min(first, second) > 0


def test_outliers_and_one_of_two_speeds_decide_nothing() -> None:
    assert average_middle_half([240, 254, 240, 254, 2000, 240, 254, 1]) == pytest.approx(247)
    assert average_middle_half([3.0, 1.0]) == 2


def test_a_row_that_stays_dense_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--head-dim", "16", "--lengths", "200", "--inputs", "random", "--calls", "2"]
    assert main(["bench", *SHAPE, *arguments, "--kernel-backend", "flash"]) == 0
    assert "flash, which doesn't fit (device cpu)" in capsys.readouterr().out


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
