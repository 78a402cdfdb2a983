"""The Pareto benchmark: its curves and their comparison, its oracle, and that it measures each setting once."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexprefill_compile.block_masks.layout import unpack_blocks
from flexprefill_compile.models import load_model
from flexprefill_compile.settings.config import SparsePrefillConfig

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(autouse=True)
def beside_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


def make_points(estimator: str, *figures: tuple[float, float], **fields: Any) -> list[Any]:
    from pareto_curves import Point  # noqa: PLC0415

    common = {"text": "t", "tokens": 2048, "gamma": 0.9, "min_budget": 0, "block_size": 128} | fields
    return [Point(estimator=estimator, density=density, ratio=ratio, **common) for density, ratio in figures]


def test_a_curve_goes_through_the_settings_that_no_other_beats() -> None:
    from pareto_curves import Curve  # noqa: PLC0415

    curve = Curve(make_points("auto", (0.3, 1.05), (0.2, 1.1), (0.4, 1.06), (0.5, 1.01)))
    assert curve.knots == [(0.2, 1.1), (0.3, 1.05), (0.5, 1.01)]
    assert curve.at(0.2) == 1.1
    assert curve.at(0.25) == pytest.approx(1.075)
    assert curve.at(0.9) == 1.01
    assert math.isnan(curve.at(0.19))


DENSITIES = st.floats(0.01, 1, allow_subnormal=False).map(lambda x: round(x, 6))
FIGURES = st.lists(st.tuples(DENSITIES, st.floats(1, 1.5)), min_size=1, max_size=8, unique_by=lambda x: x[0])


@settings(max_examples=80, deadline=None)
@given(figures=FIGURES, others=FIGURES, density=st.floats(0, 1))
def test_the_largest_excess_is_the_largest_everywhere(
    figures: list[tuple[float, float]], others: list[tuple[float, float]], density: float
) -> None:
    from pareto_curves import Curve, find_largest_excess  # noqa: PLC0415

    curve, other = (Curve(make_points("x", *each)) for each in (figures, others))
    found = find_largest_excess(curve, other)
    assert found is not None
    assert found[0] == curve.at(found[1]) - other.at(found[1])
    difference = curve.at(density) - other.at(density)
    assert math.isnan(difference) or difference <= found[0] + 1e-9


@pytest.mark.parametrize(
    ("figures", "is_fine", "sentence"),
    [
        ([(0.2, 1.04), (0.4, 1.0)], True, "nowhere is auto worse than flexprefill (1 curves; closest -0.0100"),
        ([(0.3, 1.035), (0.4, 1.0)], False, "auto is worse than flexprefill on 1 of 1 curves: at most +0.0050"),
        ([(0.2, 1.04), (0.25, 1.03)], False, "at most +0.0200 in ratio at density 0.400 of t, 2048 tokens, blocks 128"),
        ([(0.1, 1.0698), (0.3, 1.0301), (0.4, 1.0)], True, "closest +0.0001"),
    ],
)
def test_auto_is_held_against_flexprefill(figures: list[tuple[float, float]], is_fine: bool, sentence: str) -> None:
    from pareto_curves import compare_methods, group_curves  # noqa: PLC0415

    points = make_points("flexprefill", (0.2, 1.05), (0.4, 1.01)) + make_points("auto", *figures)
    verdict, text = compare_methods(group_curves(points), "auto", "flexprefill", 2e-4)
    assert verdict == is_fine
    assert sentence in text


def test_without_points_in_common_nothing_is_claimed() -> None:
    from pareto_curves import compare_methods, group_curves  # noqa: PLC0415

    points = make_points("flexprefill", (0.2, 1.05)) + make_points("auto", (0.2, 1.0), block_size=64)
    assert compare_methods(group_curves(points), "auto", "flexprefill", 0)[0] is False


def test_the_table_has_each_text_and_their_mean() -> None:
    from pareto_curves import format_curves, group_curves  # noqa: PLC0415

    points = make_points("auto", (0.2, 1.21), text="a") + make_points("auto", (0.25, 1.0), text="b")
    table = format_curves(group_curves(points)).splitlines()
    assert table[2] == "| 2048 | a | auto | 128 | - | 1.2100 | 1.2100 | 1.2100 | 1.2100 | 1.2100 |"
    assert table[3] == "| 2048 | b | auto | 128 | - | - | 1.0000 | 1.0000 | 1.0000 | 1.0000 |"
    assert table[4] == "| 2048 | mean | auto | 128 | - | - | 1.1000 | 1.1000 | 1.1000 | 1.1000 |"


@pytest.mark.parametrize("length", [64, 75])
def test_the_oracle_knows_the_mass_of_each_block(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import oracle_blocks  # noqa: PLC0415

    monkeypatch.setitem(oracle_blocks.SCORES_AT_ONCE, "cpu", 2 * 4 * 16 * length)  # two blocks at a time
    query, key = torch.randn(1, 4, length, 8), torch.randn(1, 2, length, 8)
    scores = query.double() @ key.double().repeat_interleave(2, 1).mT * 0.7
    weights = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
    mass = oracle_blocks.compute_block_mass(query, key, 0.7, 16)
    for row, queries in enumerate(weights.split(16, dim=-2)):
        for column, block in enumerate(queries.split(16, dim=-1)):
            expected = block.sum(-1).mean(-1)
            torch.testing.assert_close(mass[..., row, column].double(), expected, atol=1e-6, rtol=1e-5)

    config = SparsePrefillConfig(gamma=0.8, min_budget=0, block_size=16)
    tables = oracle_blocks.select_by_oracle(query, key, key, 0.7, config)
    num_blocks = mass.shape[-1]
    kept = unpack_blocks(*tables[:2], num_blocks) | unpack_blocks(*tables[2:], num_blocks)
    assert (mass.where(kept, 0).sum(-1) >= 0.8 - 1e-6).all()
    smallest = mass.where(kept, 2).min(-1).values
    optional = kept & ~torch.eye(num_blocks, dtype=torch.bool)
    optional[..., 0] = False
    without = mass.where(kept, 0).sum(-1) - smallest
    assert (without < 0.8 + 1e-6)[optional.sum(-1) == kept.sum(-1)].all()


def test_each_setting_is_measured_once(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import pareto  # noqa: PLC0415

    (tmp_path / "words").write_text("Everyone is permitted to copy and distribute verbatim copies. " * 4)
    file = tmp_path / "points.json"
    arguments = ["pareto", "--model", str(model_folder), "--texts", str(tmp_path / "words"), "--lengths", "96"]
    arguments += ["--block-sizes", "16", "--gammas", "0.5", "0.9", "--min-budgets", "0", "--json", str(file)]
    arguments += ["--plot", str(tmp_path / "plot.png"), "--estimators", "auto", "flexprefill"]
    monkeypatch.setattr("sys.argv", arguments)
    assert pareto.main() == 0
    first = capsys.readouterr()
    points = json.loads(file.read_text())["points"]
    assert len(points) == 2 * 2
    assert all(0 < point["density"] <= 1 and 0.5 < point["ratio"] < 2 for point in points)
    assert first.err.count("Point(") == 4
    assert "| 96 | words | auto | 16 |" in first.out
    assert "auto" in first.out.splitlines()[-1]
    assert (tmp_path / "plot.png").stat().st_size > 1000

    monkeypatch.setattr("sys.argv", [*arguments, "oracle"])
    assert pareto.main() == 0
    second = capsys.readouterr()
    assert second.err.count("Point(") == second.err.count("estimator='oracle'") == 2
    monkeypatch.setattr("sys.argv", [*arguments, "--lengths", "100000"])
    assert pareto.main() == 2
    assert "words must be of 100000 tokens, got" in capsys.readouterr().err


def test_a_window_has_budgets_but_no_gamma() -> None:
    import pareto  # noqa: PLC0415

    options = argparse.Namespace(
        estimators=["streaming", "auto"], block_sizes=[64], gammas=[0.5, 0.9], min_budgets=[64]
    )
    listed = pareto.list_settings(options)
    assert [setting for name, _, setting in listed if name == "auto"] == [(0.5, 64), (0.9, 64)]
    assert len({gamma for name, _, (gamma, _) in listed if name == "streaming"}) == 1
    assert [budget for name, _, (_, budget) in listed if name == "streaming"] == [64, *pareto.STREAMING_BUDGETS]


def test_the_texts_have_names() -> None:
    import pareto  # noqa: PLC0415

    def tokenise(text: str, **_: Any) -> Any:
        return argparse.Namespace(input_ids=torch.tensor([[len(text)]]))

    lengths = {name: int(pareto.read_text(tokenise, name, 10)[0]) for name in ("code", "python")}
    assert lengths["code"] == len(Path(argparse.__file__).read_text())
    assert lengths["python"] > 100_000


def test_a_model_is_loaded_in_the_dtype_asked_for(model_folder: Path) -> None:
    assert load_model(model_folder, "cpu")[0].dtype == torch.float32
    assert load_model(model_folder, "cpu", torch.bfloat16)[0].dtype == torch.bfloat16
