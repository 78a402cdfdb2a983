"""The device that a user names, checked before anything is loaded."""

from __future__ import annotations

import torch

from .errors import UsageError


def check_device(name: str) -> str:
    """Return a device's plain name: "cpu", "cuda" or "cuda:1".

    Raises:
        UsageError: It is neither a CPU nor a CUDA device, or not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device must be cpu or cuda, got {name!r}")
    if device.type == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise UsageError("no CUDA device: add --device cpu")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise UsageError(f"no device {name}: the last one is cuda:{torch.cuda.device_count() - 1}")
    return str(device)
