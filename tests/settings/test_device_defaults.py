"""From what length on sparse prefill is taken to pay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.models import causal_attention

from flexprefill_compile.backend import FlexPrefillBackend
from flexprefill_compile.commands.cli import main
from flexprefill_compile.commands.tune import find_first_win
from flexprefill_compile.settings import device_defaults as crossing
from flexprefill_compile.settings.config import SparsePrefillConfig

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_a_stored_measurement_wins_over_the_table() -> None:
    assert crossing.find_crossing(CPU) == crossing.MEASURED["cpu"]
    crossing.store_crossing("cpu", 640)
    crossing.store_crossing("a GPU", 9999)
    assert crossing.find_crossing(CPU) == 640


@pytest.mark.parametrize("content", ["{", "[1]", '{"cpu": "many"}', '{"cpu": 0}'])
def test_a_broken_file_is_not_read_and_says_so(content: str, caplog: pytest.LogCaptureFixture) -> None:
    crossing.crossings_path().parent.mkdir(parents=True)
    crossing.crossings_path().write_text(content)
    assert crossing.find_crossing(CPU) == crossing.MEASURED["cpu"]
    assert "is not read" in caplog.text


def test_a_min_length_of_the_user_is_kept() -> None:
    config = SparsePrefillConfig(min_length=7)
    assert crossing.settle_min_length(config, [torch.zeros(1)]) is config


def test_the_backend_settles_it() -> None:
    crossing.store_crossing("cpu", 640)
    inputs = [torch.randn(1, 2, 512, 16) for _ in range(3)]
    backend = FlexPrefillBackend()
    torch.compile(causal_attention, backend=backend, dynamic=False)(*inputs)
    assert "512 < 640" in str(backend.report)


@pytest.mark.parametrize(
    ("sparse_ms", "expected"), [((3, 2, 1), 2), ((1, 1, 1), 1), ((1, 3, 1), 4), ((1, 1, 3), 8), ((3, 3, 3), 8)]
)
def test_the_first_win_has_no_loss_after_it(sparse_ms: tuple[int, ...], expected: int) -> None:
    times = [(2**i, 2.0, float(ms)) for i, ms in enumerate(sparse_ms)]
    assert find_first_win(times) == expected


@pytest.mark.parametrize("arguments", [["tune", "--device", "meta"], ["tune", "--device", "cpu", "--heads", "3", "2"]])
def test_mistakes_get_one_sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("flexprefill: error: ")
