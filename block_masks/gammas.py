"""Gamma on the device: one number stays a number, one for each query head becomes a small tensor. No GPU sync."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from flexprefill_compile.settings.config import SparsePrefillConfig

Share = float | Tensor


def place_gammas(config: SparsePrefillConfig, device: torch.device, dtype: torch.dtype = torch.float64) -> Share:
    """Return the config's gamma: one number, or (H, 1) on the device, to compare with (B, H, N)."""
    gammas = config.gammas
    if len(gammas) == 1:
        return gammas[0]
    return _hold(tuple(gammas), dtype, device.type == "cuda").to(device, non_blocking=True)


@functools.lru_cache(maxsize=1024)
def _hold(gammas: tuple[float, ...], dtype: torch.dtype, is_pinned: bool) -> Tensor:
    """Keep the numbers in host memory: pinned, so that copies are asynchronous and work in a CUDA graph."""
    numbers = torch.tensor(gammas, dtype=dtype, device="cpu").unsqueeze(-1)
    return numbers.pin_memory() if is_pinned else numbers


def take_all_of_dense_heads(gamma: Share, selected: Tensor, grid: Tensor) -> Tensor:
    """Return ``selected``, (B, H, N, M), or ``grid`` in heads whose gamma is 1, which keep blocks of no mass too."""
    if isinstance(gamma, Tensor):
        return torch.where(gamma.unsqueeze(-1) == 1, grid, selected)
    return grid.expand_as(selected) if gamma == 1 else selected
