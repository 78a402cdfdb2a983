"""The clocks, and dense attention as they time it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexprefill_compile.bench.timing.clocks import average_middle_half, time_in_turns_ms
from flexprefill_compile.bench.timing.dense_attention import time_dense_ms


def test_memory_that_does_not_suffice_is_no_missing_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr("flexprefill_compile.bench.timing.dense_attention.attend", fail)
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
