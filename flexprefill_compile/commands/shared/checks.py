"""What commands check before they start a long run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

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


def check_device(device: str) -> None:
    """Check that a device is one to measure on, and there.

    Raises:
        UsageError: It isn't.
    """
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UsageError(f"device must be cpu or cuda, and there, got {device}")


def check_heads(heads: Sequence[int]) -> None:
    """Check that query heads can share key heads.

    Raises:
        UsageError: Their number is no multiple of that of key heads.
    """
    if heads[0] % heads[1]:
        raise UsageError(f"query heads must be a multiple of key heads, got {heads[0]} and {heads[1]}")
