"""The block grid: pooling tokens into blocks, and packing a grid of booleans into FlexAttention's tables."""

from __future__ import annotations

from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor


class AttentionSizes(NamedTuple):
    """The sizes of one attention call; ints, or SymInts where shapes are dynamic. Lengths are in tokens."""

    batch: int
    heads: int
    query_length: int
    key_length: int


class BlockTables(NamedTuple):
    """The blocks to compute, as FlexAttention reads them: int32, columns in ascending order.

    ``kv_*`` lists the blocks on which the mask_mod runs, ``full_kv_*`` those that no mask touches. Counts are
    (B, H, num_q_blocks), indices (B, H, num_q_blocks, width); entries beyond a row's count are unused. A width of
    num_k_blocks always does; ``ops.index_width`` says when less does.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor


_Length = TypeVar("_Length", int, Tensor, int | Tensor)


def count_blocks(length: _Length, block_size: int) -> _Length:
    """Return how many blocks cover ``length`` tokens, the last one perhaps ragged."""
    return (length + block_size - 1) // block_size


def count_causal_blocks(num_blocks: int) -> int:
    """Return how many blocks of a (num_blocks, num_blocks) grid causal attention reaches."""
    return num_blocks * (num_blocks + 1) // 2


def compute_density(tables: BlockTables, possible: Tensor | None = None) -> Tensor:
    """Return the share of the blocks that dense attention would compute, (B, H) float32.

    Args:
        tables: The selection.
        possible: (B|1, H|1, num_q_blocks, num_k_blocks) bool, the blocks under the mask; None is the causal ones.
    """
    computed = (tables.kv_num_blocks + tables.full_kv_num_blocks).sum(-1)
    if possible is None:
        return computed / count_causal_blocks(tables.kv_num_blocks.shape[-1])
    return computed / possible.sum((-2, -1)).clamp(min=1)


def realize(x: Tensor) -> Tensor:
    """Copy ``x``, so that inductor does not fuse what computes it with what reads the copy."""
    return cast("Tensor", torch.ops.flexprefill.realize(x))


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


def pool_counted_blocks(x: Tensor, is_counted: Tensor, dtype: torch.dtype, elements_at_once: int) -> Tensor:
    """Average the tokens of each block that count; the others may hold anything finite.

    Args:
        x: (B, H, S, D), any strides.
        is_counted: (B|1, num_blocks, block_size) bool.
        dtype: The dtype of the sum and of the result.
        elements_at_once: How many elements of ``x`` are converted at a time; at least a block of each head is.

    Returns:
        (B, H, num_blocks, D), zero where no token of a block counts.
    """
    num_blocks, block_size = is_counted.shape[1:]
    weights = is_counted.to(dtype)
    weights = (weights / weights.sum(-1, keepdim=True).clamp(min=1))[:, None, :, :, None]
    at_once = max(1, elements_at_once // (x.shape[0] * x.shape[1] * block_size * x.shape[3]))
    means = [
        (take_blocks(x, start, at_once, block_size).to(dtype) * weights[:, :, start : start + at_once]).sum(-2)
        for start in range(0, num_blocks, at_once)
    ]
    return torch.cat(means, dim=-2)


def take_blocks(x: Tensor, start: int, count: int, block_size: int) -> Tensor:
    """Cut up to ``count`` blocks out of (B, H, S, D), the ragged last one filled with zeros.

    Returns:
        (B, H, blocks, block_size, D), a view where nothing is filled.
    """
    tokens = x[:, :, start * block_size : (start + count) * block_size]
    missing = -tokens.shape[2] % block_size
    if missing:
        tokens = torch.nn.functional.pad(tokens, (0, 0, 0, missing))
    blocks: Tensor = tokens.unflatten(2, (-1, block_size))
    return blocks


def sum_blocks(x: Tensor, block_size: int) -> Tensor:
    """Sum the tokens of each block: (..., S) to (..., num_blocks)."""
    padding = -x.shape[-1] % block_size
    blocks: Tensor = torch.nn.functional.pad(x, (0, padding)).unflatten(-1, (-1, block_size))
    return blocks.sum(-1)


def create_causal_grid(num_blocks: int, device: torch.device) -> Tensor:
    """Return the (num_blocks, num_blocks) booleans of the blocks that causal attention reaches."""
    return torch.ones(num_blocks, num_blocks, dtype=torch.bool, device=device).tril()


def unpack_blocks(num_blocks: Tensor, indices: Tensor, num_k_blocks: int) -> Tensor:
    """Undo the packing of one kind of blocks.

    Args:
        num_blocks: (B, H, num_q_blocks) int, how many blocks of each row are listed.
        indices: (B, H, num_q_blocks, width) int, those blocks first.
        num_k_blocks: Of the grid.

    Returns:
        (B, H, num_q_blocks, num_k_blocks) bool.
    """
    is_listed = torch.arange(indices.shape[-1], device=indices.device) < num_blocks.unsqueeze(-1)
    columns = torch.where(is_listed, indices, num_k_blocks).long()
    grid = torch.zeros(*num_blocks.shape, num_k_blocks + 1, dtype=torch.bool, device=indices.device)
    return grid.scatter(-1, columns, True)[..., :num_k_blocks]


def pack_causal_blocks(selected: Tensor, width: int | None = None) -> BlockTables:
    """Pack a causal selection, split into the masked diagonal and the full blocks below it.

    A block below the diagonal is full: each of its keys comes before each of its queries. The ragged last key block
    is read by the diagonal block alone, where the mask_mod runs.

    Args:
        selected: (B, H, num_blocks, num_blocks) bool, nothing above the diagonal.
        width: Columns of the indices, at least the largest count; num_blocks by default.
    """
    return BlockTables(*_pack(selected & ~selected.tril(-1), width), *_pack(selected.tril(-1), width))


def pack_masked_blocks(selected: Tensor, certain: Tensor) -> BlockTables:
    """Pack a selection, split into the blocks that the mask may cross and those it leaves whole.

    Args:
        selected: (B, H, num_q_blocks, num_k_blocks) bool.
        certain: (B|1, H|1, num_q_blocks, num_k_blocks) bool, the blocks whose every pair is attended.
    """
    return BlockTables(*_pack(selected & ~certain, None), *_pack(selected & certain, None))


def _pack(selected: Tensor, width: int | None) -> tuple[Tensor, Tensor]:
    num_blocks = selected.shape[-1]
    columns = torch.arange(num_blocks, dtype=torch.int32, device=selected.device)
    # Selected columns sort before the others, each kind in ascending order, so no row needs its own length.
    order = torch.where(selected, columns, columns + num_blocks).sort(dim=-1).values
    return selected.sum(-1, dtype=torch.int32), order[..., :width].remainder(num_blocks).contiguous()
