"""``flexprefill tune``: the break-even length of some times, and one sentence for each mistake."""

from __future__ import annotations

import pytest

from flexprefill_compile.commands.cli import main
from flexprefill_compile.commands.tune import compute_break_even_length


@pytest.mark.parametrize(
    ("sparse_ms", "expected"), [((3, 2, 1), 2), ((1, 1, 1), 1), ((1, 3, 1), 4), ((1, 1, 3), 8), ((3, 3, 3), 8)]
)
def test_the_break_even_length_has_no_loss_after_it(sparse_ms: tuple[int, ...], expected: int) -> None:
    times = [(2**i, 2.0, float(ms)) for i, ms in enumerate(sparse_ms)]
    assert compute_break_even_length(times) == expected


@pytest.mark.parametrize(
    "arguments",
    [["tune", "--device", "meta"], ["tune", "--device", "abacus"], ["tune", "--device", "cpu", "--heads", "3", "2"]],
)
def test_mistakes_get_one_sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("flexprefill: error: ")
