"""Antidiagonal scoring: XAttention, arXiv 2503.16428, with its stride of 8.

The scores of as many queries as keys form a tile. The sum along its antidiagonal meets every query, every key, and each
vertical or slanted line through the tile once. It is one product: the queries of a tile, last first, written one after
the other into one vector of stride * D, times its keys likewise.
"""

from __future__ import annotations

from torch import Tensor

from ..layout import take_blocks
from .block_shares import Columns, Rows, compute_block_shares
from .inputs import EstimatorInputs
from .kernel_calls import share_antidiagonals

_STRIDE = 8


def score_xattention(inputs: EstimatorInputs) -> Tensor:
    """Return the attention of tiles of 8 x 8 scores, (B, H, num_q_blocks, num_k_blocks)."""
    return score_antidiagonals(inputs, _STRIDE)


def score_antidiagonals(inputs: EstimatorInputs, stride: int) -> Tensor:
    """Return the softmax of the tiles' antidiagonal sums, by block: (B, H, num_q_blocks, num_k_blocks).

    In a tile at the end of a prompt, or at the edge of padding, the tokens that are missing count as the mean of those
    that are there.

    Args:
        inputs: Of the attention call.
        stride: Tokens to a side of a tile, a divisor of the block size.
    """
    shares = share_antidiagonals(inputs, stride)
    return _score_by_tiles(inputs, stride) if shares is None else shares


def _score_by_tiles(inputs: EstimatorInputs, stride: int) -> Tensor:
    def take(first: int, last: int) -> Tensor:
        return _list_tiles(inputs, inputs.query, inputs.query_counts, stride, first, last).flip(-2).flatten(-2)

    num_k_blocks = inputs.grid.shape[-1]
    keys = _list_tiles(inputs, inputs.key, inputs.key_counts, stride, 0, num_k_blocks).flatten(-2).flatten(2, 3)
    query_counts, key_counts = (x.unflatten(-1, (-1, stride)) for x in (inputs.query_counts, inputs.key_counts))
    rows = Rows(take, query_counts.sum(-1), inputs.end_of_groups(stride))
    return compute_block_shares(inputs, rows, Columns(keys, key_counts), inputs.scale / stride)


def _list_tiles(inputs: EstimatorInputs, x: Tensor, counts: Tensor, stride: int, first: int, last: int) -> Tensor:
    """Return the tokens of some blocks by tile, (B, H, blocks, tiles, stride, D)."""
    blocks = take_blocks(x, first, last - first, inputs.block_size).to(inputs.product_dtype)
    tiles: Tensor = blocks.unflatten(3, (-1, stride))
    if inputs.facts is None and last * inputs.block_size <= x.shape[2]:
        return tiles
    is_there = counts[:, None, first:last, :, None].unflatten(3, (-1, stride))
    number = is_there.sum(-2, keepdim=True).clamp(min=1)
    mean = tiles.masked_fill(~is_there, 0).sum(-2, keepdim=True, dtype=inputs.dtype) / number
    return tiles.where(is_there, mean.to(tiles.dtype))
