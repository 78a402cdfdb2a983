"""Defaults that depend on the device: what an estimator selects by, the break-even length, the ceiling on density.

The break-even length is the prompt length from which on sparse prefill is no slower than dense. It was measured on
known devices, and ``flexprefill tune`` measures it on this machine. A ceiling on density reads one number from the
device at run time; from a second length on, that costs next to nothing.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .config import DensityCeiling, SparsePrefillConfig
from .policy import LayerPolicy, Policy
from .registry import find_defaults

logger = logging.getLogger(__name__)

# Break-even lengths in tokens, by device name: `flexprefill tune` with its defaults.
MEASURED = {"cpu": 4096, "NVIDIA H100 80GB HBM3": 8192, "NVIDIA H200": 8192}
_UNKNOWN_GPU = 16384
# Lengths in tokens, by device name: from here on dense attention takes so long that a selection in vain, and the read
# of its density, hardly add to it. A CPU has nothing to wait for.
CEILING_FROM = {"cpu": 1, "NVIDIA H100 80GB HBM3": 65536, "NVIDIA H200": 65536}
_CEILING_FROM_UNKNOWN_GPU = 65536
# Of the causal blocks: FlexAttention at this density takes as long as the fastest dense attention on an H100, 0.72 to
# 0.75, and on an H200, 0.78. By the kernels of flash-attn-4 it takes less from 32k tokens on at any density that was
# seen, 90 % of the blocks among them.
GPU_MAX_DENSITY = 0.75


def resolve_selection(
    config: SparsePrefillConfig, options: Collection[str], device: torch.device
) -> SparsePrefillConfig:
    """Fill in what an estimator selects by on a device: ``gamma`` on a CPU, ``block_size`` on a GPU.

    The kernels of flash-attn-4 take blocks of 128 alone: where they may run, blocks stay as large.

    Args:
        config: As the user gave it.
        options: The names given; a ``block_size`` among them stays.
        device: Of the inputs.
    """
    if device.type == "cuda":
        may_use_flash = config.kernel_backend != "triton" and is_flash_available()
        if "block_size" in options or may_use_flash:
            return config
        return dataclasses.replace(config, block_size=find_defaults(config.estimator).gpu_block_size)
    if config.gamma is not None:
        return config
    policy = config.policy
    if isinstance(policy, Policy):
        policy = dataclasses.replace(
            policy, layers={number: _fill_gamma(own) for number, own in dict(policy.layers).items()}
        )
    return dataclasses.replace(config, gamma=find_defaults(config.estimator).cpu_gamma, policy=policy)


def _fill_gamma(layer: LayerPolicy) -> LayerPolicy:
    """Give a layer with an estimator of its own that estimator's gamma on a CPU."""
    if layer.estimator is None or layer.gamma is not None:
        return layer
    return dataclasses.replace(layer, gamma=find_defaults(layer.estimator).cpu_gamma)


def resolve_min_length(config: SparsePrefillConfig, example_inputs: Sequence[Any]) -> SparsePrefillConfig:
    """Fill in ``min_length`` where it is None, for the device of a graph's inputs.

    Under a ceiling that was asked for, prompts too short for it to be free stay dense: it promises no loss.
    """
    if config.min_length is not None:
        return config
    device = find_device(example_inputs)
    min_length = find_break_even_length(device)
    if config.max_density is not None and config.max_density < 1:
        min_length = max(min_length, _find_ceiling_start(device))
    return dataclasses.replace(config, min_length=min_length)


def resolve_ceiling(
    config: SparsePrefillConfig, example_inputs: Sequence[Any], *, has_cuda_graphs: bool
) -> DensityCeiling | None:
    """Return the ceiling on density for the device of a graph's inputs, or None for none.

    Args:
        config: Its ``max_density`` as the user gave it.
        example_inputs: Of the graph.
        has_cuda_graphs: Whether it will be replayed as CUDA graphs, which take the same way each time.
    """
    device = find_device(example_inputs)
    if config.max_density is not None:
        is_on = config.max_density < 1 and not (has_cuda_graphs and device.type == "cuda")
        return DensityCeiling(config.max_density, from_length=1) if is_on else None
    if device.type != "cuda" or has_cuda_graphs or config.is_dense:
        return None
    return DensityCeiling(GPU_MAX_DENSITY, _find_ceiling_start(device), binds_flash=False)


def _find_ceiling_start(device: torch.device) -> int:
    """Return the length in tokens from which on a ceiling on density costs nothing on a device."""
    return CEILING_FROM.get(name_device(device), _CEILING_FROM_UNKNOWN_GPU)


def find_device(example_inputs: Sequence[Any]) -> torch.device:
    """Return the device of a graph's inputs: a GPU if there is one among them."""
    devices = (x.device for x in example_inputs if isinstance(x, torch.Tensor))
    gpu_first = sorted(devices, key=lambda device: device.type != "cuda")
    return gpu_first[0] if gpu_first else torch.device("cpu")


def find_break_even_length(device: torch.device) -> int:
    """Return the break-even length on a device, in tokens: as measured on this machine, or else the table's."""
    name = name_device(device)
    return read_break_even_lengths().get(name, MEASURED.get(name, _UNKNOWN_GPU))


def name_device(device: torch.device) -> str:
    """Return the name under which a device's break-even length is kept."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def break_even_path() -> Path:
    """Return the file of this machine's measurements, under $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flexprefill-compile" / "crossings.json"


def read_break_even_lengths() -> dict[str, int]:
    """Return the break-even lengths measured on this machine, in tokens by device name."""
    path = break_even_path()
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


def store_break_even_length(name: str, tokens: int) -> Path:
    """Keep the break-even length of a device; return the file it went to."""
    path = break_even_path()
    lengths = read_break_even_lengths() | {name: tokens}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(lengths, indent=1) + "\n")
    return path


def is_flash_available() -> bool:
    """Tell whether flash-attn-4 is installed, the way inductor's FlexAttention looks for it."""
    try:
        return find_spec("flash_attn.cute") is not None
    except ImportError:  # no flash_attn at all
        return False
