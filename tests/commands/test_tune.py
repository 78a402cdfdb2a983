"""``flexprefill tune``: the break-even length of some times, and one sentence for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexprefill_compile.commands import tune
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


@pytest.mark.parametrize(
    ("sparse_ms", "lines"),
    [
        (1.0, ["the break-even length on cpu is 64 tokens: by default, shorter prompts stay dense"]),
        (
            3.0,
            [
                "sparse attention was slower than dense at 128 tokens, the longest prompt measured",
                "the break-even length on cpu is 256 tokens: by default, shorter prompts stay dense",
            ],
        ),
    ],
)
def test_it_says_which_prompts_stay_dense_and_what_it_wrote(
    sparse_ms: float,
    lines: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "_LENGTHS", {"cpu": (64, 128)})
    monkeypatch.setattr(tune, "time_dense_ms", lambda *_: {"flash": 2.0})
    monkeypatch.setattr(tune, "time_ms", lambda *_: sparse_ms)
    assert main(["tune", "--device", "cpu", "--heads", "2", "1", "--head-dim", "16"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1 - len(lines) : -1] == lines
    assert printed[-1] == f"wrote {tmp_path / 'flexprefill-compile' / 'crossings.json'}"
