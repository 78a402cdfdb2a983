"""What the command line says to a user."""

from __future__ import annotations

import pytest


def one_sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line that a command printed to say what is wrong."""
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    (line,) = [line for line in captured.err.splitlines() if line.startswith("flexprefill: error: ")]
    return line.removeprefix("flexprefill: error: ")
