"""What commands check before they start a long run."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...devices import check_device
from ...errors import UsageError


@contextmanager
def needs_extra(extra: str, command: str) -> Iterator[None]:
    """Turn a failed import into a sentence that says what to install.

    Args:
        extra: The extra of the package that brings the module.
        command: Who needs it.

    Raises:
        UsageError: A module is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        install = f"pip install 'flexprefill-compile[{extra}]'"
        raise UsageError(f"{command} needs {error.name}, of the extra '{extra}': {install}") from None


def check_device_kind(device: str) -> str:
    """Return "cpu" or "cuda", for a command that measures on the current device of its kind.

    Raises:
        UsageError: It is neither, or not there.
    """
    device = check_device(device)
    if device not in ("cpu", "cuda"):
        raise UsageError(f"device must be cpu or cuda, got {device}: choose a GPU by CUDA_VISIBLE_DEVICES")
    return device


def check_heads(heads: Sequence[int]) -> None:
    """Check that query heads can share key heads.

    Raises:
        UsageError: Their number is no multiple of that of key heads.
    """
    if heads[0] % heads[1]:
        raise UsageError(f"query heads must be a multiple of key heads, got {heads[0]} and {heads[1]}")


def check_file(path: Path | None) -> None:
    """Check that a file can be written; None is no file.

    Raises:
        UsageError: It is a folder, or its folder is missing or can't be written to.
    """
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"can't write {path}: it is a folder")
    if not path.parent.is_dir():
        raise UsageError(f"can't write {path}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"can't write {path}: no permission")


def check_plots_folder(path: Path | None) -> None:
    """Check that pictures can be drawn, and written to a folder that is made if need be; None is no pictures.

    Raises:
        UsageError: matplotlib is not installed, or the folder can't be made or written to.
    """
    if path is None:
        return
    with needs_extra("plot", "--plots"):
        importlib.import_module("matplotlib.figure")
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not nearest.is_dir():
        raise UsageError(f"can't write plots to {path}: {nearest} is a file")
    if not os.access(nearest, os.W_OK):
        raise UsageError(f"can't write plots to {path}: no permission in {nearest}")


def write_text(path: Path, text: str) -> None:
    """Write a file, and say so.

    Raises:
        UsageError: It can't be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"can't write {path}: {error.strerror}") from None
    print(f"wrote {path}")
