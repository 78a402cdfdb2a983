"""The Triton kernel that chooses each head's pattern, and the columns and diagonals of vertical-slash heads."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import next_power_of_2
from ..thresholds import find_threshold
from .buffers import SelectionBuffers

# Patterns of a head, as choose_patterns writes them.
EVERY_BLOCK = tl.constexpr(0)
VERTICAL_SLASH = tl.constexpr(1)
QUERY_AWARE = tl.constexpr(2)


def launch_choose_patterns(buffers: SelectionBuffers, pooled: Tensor) -> None:
    """Choose each head's pattern, and the thresholds of its columns and diagonals."""
    config = buffers.config
    buffers.run(
        choose_patterns,
        (buffers.batch * buffers.heads,),
        {
            "pooled": pooled,
            "query_peak": buffers.query_peak,
            "key_peak": buffers.key_peak,
            "value_peak": buffers.value_peak,
            "profiles": buffers.profiles,
            "patterns": buffers.patterns,
            "thresholds": buffers.thresholds,
            "last_ties": buffers.last_ties,
            "gammas": buffers.gammas,
            "gamma": config.gammas[0],
            "scale": buffers.scale,
            "tau": config.tau,
            "first_diagonal": (buffers.length - buffers.num_rows) // buffers.block_size,
            "num_blocks": buffers.num_blocks,
            "heads": buffers.heads,
            "kv_heads": buffers.kv_heads,
            "HEAD_DIM": buffers.head_dim,
            "NUM_BLOCKS": next_power_of_2(buffers.num_blocks),
            "IS_RAGGED": buffers.is_ragged,
            "HAS_VALUE": buffers.value is not None,
            "HAS_GAMMAS": buffers.has_gammas,
        },
        num_warps=max(1, min(8, buffers.num_blocks // 128)),
    )


@triton.jit
def choose_patterns(
    pooled: tl.tensor,
    query_peak: tl.tensor,
    key_peak: tl.tensor,
    value_peak: tl.tensor,
    profiles: tl.tensor,
    patterns: tl.tensor,
    thresholds: tl.tensor,
    last_ties: tl.tensor,
    gammas: tl.tensor,
    gamma: float,
    scale: float,
    tau: float,
    first_diagonal: int,
    num_blocks: int,
    heads: int,
    kv_heads: int,
    HEAD_DIM: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    IS_RAGGED: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    HAS_GAMMAS: tl.constexpr,
) -> None:
    """Choose a head's pattern, put its mass on block diagonals, and find where its columns and diagonals reach gamma.

    Grid: (B * H,). ``profiles`` is (B, H, 2, num_blocks): columns and diagonals. ``patterns`` is (B, H). With
    HAS_GAMMAS, ``gammas`` holds gamma for each query head, (H,) float32, and ``gamma`` is not read. ``thresholds`` and
    ``last_ties`` are (B, H, 2), written for vertical-slash heads.
    """
    program = tl.program_id(0).to(tl.int64)
    batch_kv = program // heads * kv_heads + program % heads // (heads // kv_heads)
    pooled += program * 5 * num_blocks
    block = tl.arange(0, NUM_BLOCKS)
    is_block = block < num_blocks
    columns = tl.load(pooled + block, mask=is_block, other=0.0)
    logits = tl.load(pooled + 4 * num_blocks + block, mask=is_block, other=float("-inf"))
    estimate = tl.exp2((logits - tl.max(logits, 0)) * 1.4426950408889634)
    estimate = estimate / tl.sum(estimate, 0)
    divergence = _entropy((columns + estimate) / 2) - (_entropy(columns) + _entropy(estimate)) / 2
    is_query_aware = tl.sqrt(tl.maximum(divergence, 0.0)) < tau

    diagonals = tl.zeros([NUM_BLOCKS], tl.float32)
    for delta in tl.static_range(-1, 3 if IS_RAGGED else 2):
        source = first_diagonal + delta - block
        diagonals += _share_on_diagonal(pooled, source, num_blocks, is_block, delta, IS_RAGGED)
        # What would cross beyond the last diagonal goes to the last.
        source = tl.where(block == num_blocks - 1, first_diagonal + delta - num_blocks, -1)
        diagonals += _share_on_diagonal(pooled, source, num_blocks, is_block, delta, IS_RAGGED)

    # A bound on every pooled score: if it is finite, so is the whole pooled estimate.
    peak = tl.max(tl.load(query_peak + program * (num_blocks + 1) + block, mask=is_block, other=0.0), 0)
    bound = peak * tl.max(tl.load(key_peak + batch_kv * num_blocks + block, mask=is_block, other=0.0), 0)
    bound = bound * tl.maximum(tl.abs(scale) * HEAD_DIM, 1.0) + tl.sum(columns, 0)
    if HAS_VALUE:
        bound += tl.max(tl.load(value_peak + batch_kv * num_blocks + block, mask=is_block, other=0.0), 0)
    pattern = tl.where(is_query_aware, QUERY_AWARE, VERTICAL_SLASH)
    tl.store(patterns + program, tl.where(bound < float("inf"), pattern, EVERY_BLOCK))
    diagonals = tl.maximum(diagonals, 0.0)
    tl.store(profiles + program * 2 * num_blocks + block, columns, mask=is_block)
    tl.store(profiles + (program * 2 + 1) * num_blocks + block, diagonals, mask=is_block)
    if is_query_aware:
        return
    if HAS_GAMMAS:
        gamma = tl.load(gammas + program % heads)
    _store_threshold(columns, program * 2, thresholds, last_ties, gamma, num_blocks, NUM_BLOCKS)
    _store_threshold(diagonals, program * 2 + 1, thresholds, last_ties, gamma, num_blocks, NUM_BLOCKS)


@triton.jit
def _store_threshold(
    profile: tl.tensor,
    entry: tl.tensor,
    thresholds: tl.tensor,
    last_ties: tl.tensor,
    gamma: float,
    num_blocks: int,
    NUM_BLOCKS: tl.constexpr,
) -> None:
    block = tl.arange(0, NUM_BLOCKS)
    bits = tl.where(block < num_blocks, profile.to(tl.int32, bitcast=True), -1)
    threshold, last = find_threshold(bits, block, gamma, num_blocks)
    tl.store(thresholds + entry, threshold)
    tl.store(last_ties + entry, last)


@triton.jit
def _entropy(p: tl.tensor) -> tl.tensor:
    return -tl.sum(tl.where(p > 0, p * tl.log(tl.where(p > 0, p, 1.0)), 0.0), 0)


@triton.jit
def _share_on_diagonal(
    pooled: tl.tensor,
    source: tl.tensor,
    num_blocks: int,
    is_block: tl.tensor,
    DELTA: tl.constexpr,
    IS_RAGGED: tl.constexpr,
) -> tl.tensor:
    """Return what key blocks ``source`` put on the block diagonal DELTA away from their own.

    An offset u between DELTA - 1 and DELTA + 1 counts there for 1 - |u - DELTA|, written in the means kept of it.
    """
    inside = is_block & (source >= 0) & (source < num_blocks)
    after = tl.load(pooled + num_blocks + source, mask=inside, other=0.0)
    before = tl.load(pooled + 2 * num_blocks + source, mask=inside, other=0.0)
    beyond = tl.zeros_like(after)
    if IS_RAGGED:
        beyond = tl.load(pooled + 3 * num_blocks + source, mask=inside, other=0.0)
    if DELTA == -1:
        share = before
    elif DELTA == 0:
        share = tl.load(pooled + source, mask=inside, other=0.0) - before - after + beyond
    elif DELTA == 1:
        share = after - 2 * beyond
    else:
        share = beyond
    return share
