"""The Triton kernel that averages the masses of the last queries, and its launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv
from .buffers import SelectionBuffers

_TILE = 16


def launch_pool_masses(buffers: SelectionBuffers, masses: Tensor, chunk_masses: Tensor) -> Tensor:
    """Average the masses over the rows, beside their estimate: (B * H, 5, num_blocks) float32."""
    heads = buffers.batch * buffers.heads
    pooled = buffers.query.new_empty((heads, 5, buffers.num_blocks), dtype=torch.float32)
    buffers.run(
        pool_masses,
        (cdiv(buffers.num_blocks, _TILE), heads),
        {
            "masses": masses,
            "chunk_masses": chunk_masses,
            "pooled_query": buffers.pooled_query,
            "pooled_key": buffers.pooled_key,
            "pooled": pooled,
            "scale": buffers.scale,
            "num_blocks": buffers.num_blocks,
            "num_rows": buffers.num_rows,
            "num_chunks": chunk_masses.shape[1],
            "plane": masses.stride(0),
            "heads": buffers.heads,
            "kv_heads": buffers.kv_heads,
            "HEAD_DIM": buffers.head_dim,
            "WIDTH": buffers.width,
            "BLOCK": buffers.block_size,
            "TILE": _TILE,
            "IS_RAGGED": buffers.is_ragged,
        },
        num_warps=4,
    )
    return pooled


@triton.jit
def pool_masses(
    masses: tl.tensor,
    chunk_masses: tl.tensor,
    pooled_query: tl.tensor,
    pooled_key: tl.tensor,
    pooled: tl.tensor,
    scale: float,
    num_blocks: int,
    num_rows: int,
    num_chunks: int,
    plane: int,
    heads: int,
    kv_heads: int,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    IS_RAGGED: tl.constexpr,
) -> None:
    """Normalise a head's masses and average them over its rows; estimate the same from pooled queries and keys.

    Grid: (tiles of key blocks, B * H). ``pooled`` is (B, H, 5, num_blocks): the mass of a key block, the three parts
    of it that cross to other diagonals, and the logit of the estimate.
    """
    program = tl.program_id(1).to(tl.int64)
    group = heads // kv_heads
    batch_kv = program // heads * kv_heads + program % heads // group
    row = tl.arange(0, BLOCK)
    is_row = row < num_rows
    group_rows = group * num_rows
    first_row = program % heads % group * num_rows

    largest = tl.full([BLOCK], -1e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for chunk in range(num_chunks):
        place = (batch_kv * num_chunks + chunk) * group_rows + first_row + row
        log_mass = tl.load(chunk_masses + place, mask=is_row, other=0.0)
        new_largest = tl.maximum(largest, log_mass)
        total = total * tl.exp2(largest - new_largest) + tl.exp2(log_mass - new_largest)
        largest = new_largest
    log_total = largest + tl.log2(total)

    block = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_block = block < num_blocks
    place = (batch_kv * num_blocks + block)[:, None] * group_rows + first_row + row[None, :]
    inside = is_block[:, None] & is_row[None, :]
    log_mass = tl.load(masses + place, mask=inside, other=float("-inf"))
    mass = tl.exp2(log_mass - log_total[None, :]) / num_rows
    pooled += program * 5 * num_blocks + block
    tl.store(pooled, tl.sum(mass, 1), mask=is_block)
    for side in tl.static_range(1, 4 if IS_RAGGED else 3):
        share = tl.load(masses + side * plane + place, mask=inside, other=0.0)
        tl.store(pooled + side * num_blocks, tl.sum(mass * share, 1), mask=is_block)

    feature = tl.arange(0, WIDTH)
    is_feature = feature < HEAD_DIM
    mean_query = tl.load(
        pooled_query + ((program + 1) * (num_blocks + 1) - 1) * HEAD_DIM + feature, mask=is_feature, other=0.0
    )
    keys = tl.load(
        pooled_key + (batch_kv * num_blocks + block)[:, None] * HEAD_DIM + feature[None, :],
        mask=is_block[:, None] & is_feature[None, :],
        other=0.0,
    )
    tl.store(pooled + 4 * num_blocks, tl.sum(keys * mean_query[None, :], 1) * scale, mask=is_block)
