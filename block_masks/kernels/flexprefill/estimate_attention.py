"""The Triton kernel that estimates the attention map of query-aware heads from pooled queries and keys, and its launch.

Heads of another pattern leave it at once.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv
from .buffers import SelectionBuffers
from .choose_patterns import QUERY_AWARE

_TILE = 64


def launch_estimate_attention(buffers: SelectionBuffers, maps: Tensor, first: int, count: int) -> None:
    """Fill the maps of the query-aware ones among ``count`` heads of B * H, from number ``first`` on."""
    buffers.run(
        estimate_attention,
        (cdiv(buffers.num_blocks, _TILE), count),
        {
            "pooled_query": buffers.pooled_query,
            "pooled_key": buffers.pooled_key,
            "patterns": buffers.patterns,
            "estimate": maps,
            "scale_log2e": buffers.scale * math.log2(math.e),
            "first_head": first,
            "num_blocks": buffers.num_blocks,
            "heads": buffers.heads,
            "kv_heads": buffers.kv_heads,
            "HEAD_DIM": buffers.head_dim,
            "WIDTH": buffers.width,
            "TILE": _TILE,
        },
        num_warps=4,
        num_stages=1,
    )


@triton.jit
def estimate_attention(
    pooled_query: tl.tensor,
    pooled_key: tl.tensor,
    patterns: tl.tensor,
    estimate: tl.tensor,
    scale_log2e: float,
    first_head: int,
    num_blocks: int,
    heads: int,
    kv_heads: int,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Softmax of the causal scores of pooled queries and keys, for query-aware heads.

    Grid: (row tiles, heads of B * H from ``first_head`` on); ``estimate`` holds the maps of those heads.
    """
    estimate += tl.program_id(1).to(tl.int64) * num_blocks * num_blocks
    program = first_head + tl.program_id(1).to(tl.int64)
    if tl.load(patterns + program) != QUERY_AWARE:
        return
    batch_kv = program // heads * kv_heads + program % heads // (heads // kv_heads)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    pooled_query += program * (num_blocks + 1) * HEAD_DIM
    pooled_key += batch_kv * num_blocks * HEAD_DIM
    stop = tl.minimum((tl.program_id(0) + 1) * TILE, num_blocks)
    largest = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    for start in range(0, stop, TILE):
        scores = _score_tile(pooled_query, pooled_key, scale_log2e, row, start, num_blocks, HEAD_DIM, WIDTH, TILE)
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        total = total * tl.exp2(largest - new_largest) + tl.sum(tl.exp2(scores - new_largest[:, None]), 1)
        largest = new_largest
    for start in range(0, stop, TILE):
        scores = _score_tile(pooled_query, pooled_key, scale_log2e, row, start, num_blocks, HEAD_DIM, WIDTH, TILE)
        shares = tl.exp2(scores - largest[:, None]) / total[:, None]
        column = start + tl.arange(0, TILE)
        inside = (row < num_blocks)[:, None] & (column < num_blocks)[None, :]
        tl.store(estimate + row.to(tl.int64)[:, None] * num_blocks + column[None, :], shares, mask=inside)


@triton.jit
def _score_tile(
    pooled_query: tl.tensor,
    pooled_key: tl.tensor,
    scale_log2e: float,
    row: tl.tensor,
    start: int,
    num_blocks: int,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Return the causal scores of a tile, (TILE, TILE) float32, a number of features at a time."""
    features: tl.constexpr = WIDTH if WIDTH < 64 else 64
    column = start + tl.arange(0, TILE)
    scores = tl.zeros([TILE, TILE], tl.float32)
    for part in tl.static_range(WIDTH // features):
        feature = part * features + tl.arange(0, features)
        is_feature = (feature < HEAD_DIM)[None, :]
        queries = tl.load(
            pooled_query + row[:, None] * HEAD_DIM + feature[None, :],
            mask=(row < num_blocks)[:, None] & is_feature,
            other=0.0,
        )
        keys = tl.load(
            pooled_key + column[:, None] * HEAD_DIM + feature[None, :],
            mask=(column < num_blocks)[:, None] & is_feature,
            other=0.0,
        )
        scores = tl.dot(queries, tl.trans(keys), scores, input_precision="tf32x3")
    return tl.where(column[None, :] <= row[:, None], scores * scale_log2e, float("-inf"))
