"""The break-even length of sparse prefill: from the table, from this machine, from the user."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.models import causal_attention

from flexprefill_compile.backend import FlexPrefillBackend
from flexprefill_compile.settings import device_defaults
from flexprefill_compile.settings.config import SparsePrefillConfig

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_a_stored_measurement_wins_over_the_table() -> None:
    assert device_defaults.find_break_even_length(CPU) == device_defaults.MEASURED["cpu"]
    device_defaults.store_break_even_length("cpu", 640)
    device_defaults.store_break_even_length("a GPU", 9999)
    assert device_defaults.find_break_even_length(CPU) == 640


@pytest.mark.parametrize("content", ["{", "[1]", '{"cpu": "many"}', '{"cpu": 0}'])
def test_a_broken_file_is_not_read_and_says_so(content: str, caplog: pytest.LogCaptureFixture) -> None:
    device_defaults.break_even_path().parent.mkdir(parents=True)
    device_defaults.break_even_path().write_text(content)
    assert device_defaults.find_break_even_length(CPU) == device_defaults.MEASURED["cpu"]
    assert "is not read" in caplog.text


def test_a_min_length_of_the_user_is_kept() -> None:
    config = SparsePrefillConfig(min_length=7)
    assert device_defaults.resolve_min_length(config, [torch.zeros(1)]) is config


def test_the_backend_settles_it() -> None:
    device_defaults.store_break_even_length("cpu", 640)
    inputs = [torch.randn(1, 2, 512, 16) for _ in range(3)]
    backend = FlexPrefillBackend()
    torch.compile(causal_attention, backend=backend, dynamic=False)(*inputs)
    assert "512 < 640" in str(backend.report)
