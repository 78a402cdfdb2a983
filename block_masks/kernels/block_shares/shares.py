"""The shares of ``EstimatorInputs`` and of antidiagonals on a GPU, by Triton kernels that write no scores.

    score_pieces    rows x columns -> the log of each row's mass on each piece of a key block, and on each chunk
    pool_pieces     those -> shares: normalised, summed by key block, averaged over the rows of a query block

Both run for as many query blocks at a time as ``MASSES_AT_ONCE_BYTES`` hold. For causal attention of a prompt to
itself, without a softcap; launch shapes depend on the sizes alone.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...attention_inputs import AttentionInputs
from ..launch import Launcher, run_first_that_fits
from .plan import SharePlan, Tiles, Vectors, choose_tiles
from .pool_pieces import launch_pool_pieces
from .score_pieces import launch_score_pieces

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LARGEST_HEAD_DIM = 256
MASSES_AT_ONCE_BYTES = 2**29  # of float32 masses, rows x key blocks: more rows take more launches


def can_share(inputs: AttentionInputs) -> bool:
    """Tell whether the kernels take these inputs."""
    return (
        inputs.facts is None
        and inputs.softcap is None
        and inputs.query.dtype in _DTYPES
        and inputs.query.shape[-1] <= _LARGEST_HEAD_DIM
    )


def share_rows(inputs: AttentionInputs, rows_per_block: int) -> Tensor | None:
    """Return what ``EstimatorInputs.share_of_rows`` does, or None where the GPU is too small for a tile."""
    tokens = inputs.block_size // rows_per_block
    rows = Vectors(inputs.query.unsqueeze(3), tokens, is_middle=True)
    return _share(inputs, rows, Vectors(inputs.key.unsqueeze(3), 1), inputs.scale)


def share_antidiagonals(inputs: AttentionInputs, stride: int) -> Tensor | None:
    """Return what ``score_antidiagonals`` does, or None where the GPU is too small for a tile."""
    query, key = (_list_tiles(x, stride) for x in (inputs.query, inputs.key))
    return _share(inputs, Vectors(query, stride, is_reversed=True), Vectors(key, stride), inputs.scale / stride)


def _list_tiles(x: Tensor, stride: int) -> Tensor:
    """Return (B, H, tiles, stride, D), a view if the length allows; missing tokens are the mean of their tile's."""
    rest = x.shape[2] % stride
    if rest:
        mean = x[:, :, -rest:].mean(2, keepdim=True, dtype=torch.float32).to(x.dtype)
        x = torch.cat([x, mean.expand(-1, -1, stride - rest, -1)], dim=2)
    tiles: Tensor = x.unflatten(2, (-1, stride))
    return tiles


def _share(inputs: AttentionInputs, rows: Vectors, columns: Vectors, scale: float) -> Tensor | None:
    variants = (
        functools.partial(_share_in_tiles, inputs, rows, columns, scale, tiles)
        for tiles in choose_tiles(inputs, rows, columns)
    )
    return run_first_that_fits(variants, "blocks are scored")


def _share_in_tiles(inputs: AttentionInputs, rows: Vectors, columns: Vectors, scale: float, tiles: Tiles) -> Tensor:
    """Return the shares, (B, H, num_blocks, num_blocks) float32, made for a number of query blocks at a time."""
    plan = SharePlan(inputs, rows, columns, scale, tiles)
    shares = inputs.query.new_empty(inputs.shape, dtype=torch.float32)
    at_once = min(plan.num_blocks, max(1, MASSES_AT_ONCE_BYTES // (4 * plan.block_masses)))
    layouts = tuple((x.shape, x.stride(), x.data_ptr() % 16 == 0) for x in (rows.start, columns.start))
    settings = tuple(plan.constants.values()), at_once, tiles
    launcher = Launcher((shares.device, rows.data.dtype, inputs.query.shape, layouts, settings))
    kv_heads = plan.batch * plan.kv_heads
    with torch.cuda.device_of(inputs.query):
        for first in range(0, plan.num_blocks, at_once):
            turn = plan.size_turn(first, min(first + at_once, plan.num_blocks))
            masses = shares.new_empty(kv_heads, turn.num_pieces, turn.num_rows)
            chunk_masses = shares.new_empty(kv_heads, turn.num_chunks, turn.num_rows)
            launch_score_pieces(launcher, plan, turn, masses, chunk_masses)
            launch_pool_pieces(launcher, plan, turn, masses, chunk_masses, shares)
    return shares
