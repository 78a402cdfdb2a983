"""The prediction for more GPUs: it gives back what it was fitted to, and what a made-up machine would take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def beside_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


def make_row(way: str, tokens: int, ms: float, collectives: float = 0.0) -> dict[str, Any]:
    return {"way": way, "tokens": tokens, "kind": "dense", "ms": ms, "collectives": collectives}


# 2 ms for each thousand tokens, 1 ms for each million of pairs; two ranks exchange 0.1 ms for each thousand.
ROWS = [make_row("one", 1000, 3.0), make_row("one", 3000, 15.0), make_row("sequence", 3000, 8.0, 0.3 / 8.0)]


@pytest.mark.parametrize(
    ("tokens", "ranks", "expected"),
    [(1000, 1, 3.0), (3000, 1, 15.0), (3000, 2, 8.0), (6000, 1, 48.0), (6000, 4, 12.0 + 0.6 * 0.75 + 0.2)],
)
def test_times_follow_the_formula(tokens: int, ranks: int, expected: float) -> None:
    from predict_many_gpus import fit  # noqa: PLC0415

    assert fit(ROWS, "sequence", "dense").predict("sequence", tokens, ranks) == pytest.approx(expected)


def test_too_few_lines_are_an_error() -> None:
    from predict_many_gpus import fit  # noqa: PLC0415

    with pytest.raises(ValueError, match="dense, tensor: two lengths on one card are needed"):
        fit(ROWS, "tensor", "dense")
