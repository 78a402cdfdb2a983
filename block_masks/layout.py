"""The block grid: pooling tokens into blocks, and packing a grid of booleans into FlexAttention's tables."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class BlockTables(NamedTuple):
    """The blocks to compute, as FlexAttention reads them: int32, columns in ascending order.

    ``kv_*`` lists the blocks on which the mask_mod runs, ``full_kv_*`` those that no mask touches. Counts are
    (B, H, num_blocks), indices (B, H, num_blocks, width); entries beyond a row's count are unused. A width
    of num_blocks always does; ``ops.index_width`` says when less does.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor


def count_blocks(length: int, block_size: int) -> int:
    """Return how many blocks cover ``length`` tokens, the last one perhaps ragged."""
    return (length + block_size - 1) // block_size


def pool_blocks(x: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """Average the tokens of each block.

    Args:
        x: (B, H, S, D), any strides; it is not copied.
        block_size: Tokens a block; the last block averages the tokens it has.
        dtype: The dtype of the sum and of the result.

    Returns:
        (B, H, num_blocks, D).
    """
    whole = x.shape[-2] // block_size * block_size
    blocks: Tensor = x[..., :whole, :].unflatten(-2, (-1, block_size))
    means = blocks.mean(-2, dtype=dtype)
    if whole == x.shape[-2]:
        return means
    return torch.cat([means, x[..., whole:, :].mean(-2, keepdim=True, dtype=dtype)], dim=-2)


def sum_blocks(x: Tensor, block_size: int) -> Tensor:
    """Sum the tokens of each block: (..., S) to (..., num_blocks)."""
    padding = -x.shape[-1] % block_size
    blocks: Tensor = torch.nn.functional.pad(x, (0, padding)).unflatten(-1, (-1, block_size))
    return blocks.sum(-1)


def create_causal_grid(num_blocks: int, device: torch.device) -> Tensor:
    """Return the (num_blocks, num_blocks) booleans of the blocks that causal attention reaches."""
    return torch.ones(num_blocks, num_blocks, dtype=torch.bool, device=device).tril()


def pack_causal_blocks(selected: Tensor, width: int | None = None) -> BlockTables:
    """Pack a causal selection, split into the masked diagonal and the full blocks below it.

    A block below the diagonal is full: each of its keys comes before each of its queries. The ragged last key
    block meets only the diagonal, where the mask_mod runs.

    Args:
        selected: (B, H, num_blocks, num_blocks) bool, nothing above the diagonal.
        width: Columns of the indices, at least the largest count; num_blocks by default.
    """
    return BlockTables(*_pack(selected & ~selected.tril(-1), width), *_pack(selected.tril(-1), width))


def _pack(selected: Tensor, width: int | None) -> tuple[Tensor, Tensor]:
    num_blocks = selected.shape[-1]
    columns = torch.arange(num_blocks, dtype=torch.int32, device=selected.device)
    # Selected columns sort before the others, each kind in ascending order, so no row needs its own length.
    order = torch.where(selected, columns, columns + num_blocks).sort(dim=-1).values
    return selected.sum(-1, dtype=torch.int32), order[..., :width].remainder(num_blocks).contiguous()
