"""Which measured prompts would stay dense by default, on a CPU and under a GPU's ceiling."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexprefill_compile.bench import defaults
from flexprefill_compile.settings.config import DensityCeiling
from flexprefill_compile.settings.device_defaults import store_break_even_length

CPU = torch.device("cpu")
ROWS = [
    {"tokens": 1024, "inputs": "random", "density": 0.9},
    {"tokens": 8192, "inputs": "random", "density": 0.9},
    {"tokens": 8192, "inputs": "structured", "density": 0.2},
    {"tokens": 8192, "inputs": "real", "note": "out of memory"},
]


@pytest.fixture(autouse=True)
def break_even_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store_break_even_length("cpu", 2048)


def test_short_prompts_are_named() -> None:
    short = "dense by default, shorter than min_length (2048 on cpu): "
    assert defaults.describe_defaults(ROWS, CPU) == [f"{short}1024 random"]
    assert defaults.describe_defaults([{"tokens": 1024, "density": 1.0}], CPU) == [f"{short}1024 tokens"]
    assert defaults.describe_defaults(ROWS[1:], CPU) == []


def test_prompts_above_the_ceiling_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "resolve_ceiling", lambda *_, **__: DensityCeiling(0.75, from_length=4096))
    (_, full) = defaults.describe_defaults(ROWS, CPU)
    assert full == "dense by default, over max_density (75% of the blocks): 8192 random"
