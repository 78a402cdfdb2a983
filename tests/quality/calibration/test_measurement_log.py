"""The log of measurements: what its keys depend on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flexprefill_compile import block_masks
from flexprefill_compile.quality.calibration.measurement_log import describe_code, hash_code

CODE = Path(str(block_masks.__file__)).parent


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CODE, tmp_path / "elsewhere"))


def test_the_same_code_in_another_folder_has_the_same_hash(copied: Path) -> None:
    (copied / "notes.txt").write_text("no code")
    assert hash_code(copied) == describe_code()


def test_the_hash_sees_a_change_in_every_file(copied: Path) -> None:
    files = sorted(copied.rglob("*.py"))
    assert {file.parent.relative_to(copied).as_posix() for file in files} >= {
        ".",
        "estimators/flexprefill",
        "kernels/flexprefill",
        "masks",
    }
    for file in files:
        code = file.read_text()
        file.write_text(code + "\n# changed\n")
        assert hash_code(copied) != describe_code(), file
        file.write_text(code)
    assert hash_code(copied) == describe_code()


def test_the_hash_sees_a_file_that_moves(copied: Path) -> None:
    (copied / "layout.py").rename(copied / "masks" / "layout.py")
    assert hash_code(copied) != describe_code()
