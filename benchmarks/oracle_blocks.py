"""The oracle of the Pareto benchmark: blocks chosen by the true attention mass, which takes dense work to know."""

from __future__ import annotations

import torch
from torch import Tensor

from flexprefill_compile.block_masks.layout import (
    BlockTables,
    count_blocks,
    create_causal_grid,
    pack_causal_blocks,
    sum_blocks,
)
from flexprefill_compile.block_masks.select import apply_budget, select_cumulative
from flexprefill_compile.settings.config import SparsePrefillConfig

SCORES_AT_ONCE = {"cpu": 2**24, "cuda": 2**28}


def select_by_oracle(
    query: Tensor, key: Tensor, value: Tensor, scale: float, config: SparsePrefillConfig
) -> BlockTables:
    """Select for each query block the fewest key blocks whose true mass reaches gamma, under the same floor."""
    mass = compute_block_mass(query, key, scale, config.block_size)
    causal = create_causal_grid(mass.shape[-1], mass.device)
    floor = count_blocks(config.floor_at(key.shape[2]), config.block_size)
    return pack_causal_blocks(apply_budget(select_cumulative(mass, config.gamma), mass, causal, floor, None))


def compute_block_mass(query: Tensor, key: Tensor, scale: float, block_size: int) -> Tensor:
    """Pool softmax(Q K^T) onto blocks, some query blocks at a time.

    Args:
        query: (B, H, S, D).
        key: (B, Hkv, S, D).
        scale: Factor on the scores.
        block_size: Tokens to a side of a block.

    Returns:
        (B, H, num_blocks, num_blocks) float32: the mean over a block's queries of their mass on each key block.
    """
    batch, heads, length, _ = query.shape
    keys = key.float().repeat_interleave(heads // key.shape[1], dim=1)
    num_blocks = count_blocks(length, block_size)
    blocks_at_once = max(1, SCORES_AT_ONCE[query.device.type] // (batch * heads * length * block_size))
    mass = query.new_zeros(batch, heads, num_blocks, num_blocks, dtype=torch.float32)
    for first in range(0, num_blocks, blocks_at_once):
        start, stop = first * block_size, min(length, (first + blocks_at_once) * block_size)
        scores = query[:, :, start:stop].float() * scale @ keys[:, :, :stop].mT
        positions = torch.arange(stop, device=query.device)
        weights = scores.masked_fill_(positions > positions[start:, None], -torch.inf).softmax(-1)
        by_key_block = sum_blocks(weights, block_size)
        sums = sum_blocks(by_key_block.mT, block_size).mT
        mass[:, :, first : first + sums.shape[-2], : sums.shape[-1]] = sums / block_size
    if length % block_size:
        mass[:, :, -1] *= block_size / (length % block_size)
    return mass
