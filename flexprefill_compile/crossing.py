"""From what length on sparse prefill pays: measured on known devices, or on this machine by ``flexprefill tune``."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flexprefill_compile.config import SparsePrefillConfig

logger = logging.getLogger(__name__)

# Tokens, by device name: `flexprefill tune` with its defaults. Structured inputs, against the fastest dense attention.
MEASURED = {"cpu": 4096, "NVIDIA H200": 8192}
UNKNOWN_GPU = 16384


def settle_min_length(config: SparsePrefillConfig, example_inputs: Sequence[Any]) -> SparsePrefillConfig:
    """Fill in ``min_length`` where it is None, for the device of a graph's inputs."""
    if config.min_length is not None:
        return config
    devices = (x.device for x in example_inputs if isinstance(x, torch.Tensor))
    gpu_first = sorted(devices, key=lambda device: device.type != "cuda")
    device = gpu_first[0] if gpu_first else torch.device("cpu")
    return dataclasses.replace(config, min_length=find_crossing(device))


def find_crossing(device: torch.device) -> int:
    """Return from how many tokens on sparse prefill is taken to pay on a device; this machine's measurement wins."""
    name = name_device(device)
    return read_crossings().get(name, MEASURED.get(name, UNKNOWN_GPU))


def name_device(device: torch.device) -> str:
    """Return the name under which a device's crossing is kept."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def crossings_path() -> Path:
    """Return the file of this machine's measurements, under $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flexprefill-compile" / "crossings.json"


def read_crossings() -> dict[str, int]:
    """Return this machine's measurements: tokens by device name."""
    path = crossings_path()
    if not path.exists():
        return {}
    try:
        tokens = {str(name): int(value) for name, value in json.loads(path.read_text()).items()}
        if min(tokens.values(), default=1) < 1:
            raise ValueError(f"lengths must be at least 1, got {min(tokens.values())}")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning("%s is not read: %s; flexprefill tune writes it anew", path, error)
        return {}
    return tokens


def store_crossing(name: str, tokens: int) -> Path:
    """Keep a measurement; return the file it went to."""
    path = crossings_path()
    crossings = read_crossings() | {name: tokens}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(crossings, indent=1) + "\n")
    return path
