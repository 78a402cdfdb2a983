"""The Triton kernel that packs: thresholds, budgets, sink and diagonal -> FlexAttention's tables; and its launch.

Or an estimator's scores, with a threshold for each row. Nothing is sorted.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...layout import BlockTables, count_blocks
from ...select import first_dense_block
from ..launch import next_power_of_2
from .buffers import SelectionBuffers
from .choose_patterns import EVERY_BLOCK, QUERY_AWARE


def launch_pack_blocks(
    buffers: SelectionBuffers, maps: Tensor, tables: BlockTables, first: int, count: int, *, by_row: bool = False
) -> None:
    """Pack the blocks that reach the thresholds or, by row, the fewest that reach gamma, of ``count`` heads."""
    config, num_blocks, block_size = buffers.config, buffers.num_blocks, buffers.block_size
    buffers.run(
        pack_blocks,
        (count * num_blocks,),
        {
            "profiles": buffers.profiles,
            "estimate": maps,
            "patterns": buffers.patterns,
            "thresholds": buffers.thresholds,
            "last_ties": buffers.last_ties,
            "key_peak": buffers.key_peak,
            "value_peak": buffers.value_peak,
            "gammas": buffers.gammas,
            "gamma": config.gammas[0],
            "diagonal_counts": tables.kv_num_blocks,
            "diagonal_indices": tables.kv_indices,
            "full_counts": tables.full_kv_num_blocks,
            "full_indices": tables.full_kv_indices,
            "first_head": first,
            "num_blocks": num_blocks,
            "heads": buffers.heads,
            "kv_heads": buffers.kv_heads,
            "width": tables.full_kv_indices.shape[-1],
            "min_blocks": count_blocks(config.floor_at(buffers.length), block_size),
            "max_blocks": 0 if config.max_budget is None else config.max_budget // block_size,
            "first_dense": first_dense_block(buffers.length, config),
            "NUM_BLOCKS": next_power_of_2(num_blocks),
            "BY_ROW": by_row,
            "IS_DENSE": min(config.gammas) == 1,
            "HAS_GAMMAS": buffers.has_gammas,
            "HAS_CEILING": config.max_budget is not None,
            "HAS_VALUE": buffers.value is not None,
        },
        num_warps=max(1, min(8, num_blocks // 1024)),
    )


@triton.jit
def pack_blocks(
    profiles: tl.tensor,
    estimate: tl.tensor,
    patterns: tl.tensor,
    thresholds: tl.tensor,
    last_ties: tl.tensor,
    key_peak: tl.tensor,
    value_peak: tl.tensor,
    gammas: tl.tensor,
    gamma: float,
    diagonal_counts: tl.tensor,
    diagonal_indices: tl.tensor,
    full_counts: tl.tensor,
    full_indices: tl.tensor,
    first_head: int,
    num_blocks: int,
    heads: int,
    kv_heads: int,
    width: int,
    min_blocks: int,
    max_blocks: int,
    first_dense: int,
    NUM_BLOCKS: tl.constexpr,
    BY_ROW: tl.constexpr,
    IS_DENSE: tl.constexpr,
    HAS_GAMMAS: tl.constexpr,
    HAS_CEILING: tl.constexpr,
    HAS_VALUE: tl.constexpr,
) -> None:
    """Select and pack the blocks of one query row, all of them from row ``first_dense`` on.

    With BY_ROW, a row of the map reaches gamma by itself, and ``thresholds`` and ``last_ties`` are not read.
    Grid: (heads * num_blocks,).
    """
    estimate += (tl.program_id(0) // num_blocks).to(tl.int64) * num_blocks * num_blocks
    program = first_head + (tl.program_id(0) // num_blocks).to(tl.int64)
    row = tl.program_id(0) % num_blocks
    column = tl.arange(0, NUM_BLOCKS)
    optional = (column > 0) & (column < row)
    pattern = tl.load(patterns + program)

    if pattern == QUERY_AWARE:
        place = row * num_blocks + column
        score = tl.load(estimate + place, mask=column <= row, other=0.0)
        if BY_ROW:
            if HAS_GAMMAS:
                gamma = tl.load(gammas + program % heads)
            selected = _fewest(score, gamma)
        else:
            selected = _reaches(score, place, thresholds + program * 2, last_ties + program * 2)
    elif pattern == EVERY_BLOCK:
        # Under a ceiling, blocks that are not finite come first.
        batch_kv = program // heads * kv_heads + program % heads // (heads // kv_heads)
        peak = tl.load(key_peak + batch_kv * num_blocks + column, mask=optional, other=0.0)
        if HAS_VALUE:
            peak += tl.load(value_peak + batch_kv * num_blocks + column, mask=optional, other=0.0)
        score = tl.where(peak < float("inf"), 0.0, 1.0)
        selected = optional
    else:
        profile = profiles + program * 2 * num_blocks
        by_column = tl.load(profile + column, mask=optional, other=0.0)
        by_diagonal = tl.load(profile + num_blocks + row - column, mask=optional, other=0.0)
        selected = _reaches(by_column, column, thresholds + program * 2, last_ties + program * 2)
        selected |= _reaches(by_diagonal, row - column, thresholds + program * 2 + 1, last_ties + program * 2 + 1)
        score = tl.maximum(by_column, by_diagonal)
    is_dense = row >= first_dense
    if HAS_GAMMAS:
        is_dense |= tl.load(gammas + program % heads) == 1
    if IS_DENSE:
        selected = optional
    selected = (selected | is_dense) & optional

    bits = score.to(tl.int32, bitcast=True)
    selected |= _best(bits, optional, min_blocks)
    if HAS_CEILING:
        selected = _best(bits, selected, max_blocks)
    selected |= (column == 0) & (row > 0)  # the sink
    kept = selected.to(tl.int32)
    entry = program * num_blocks + row
    tl.store(full_counts + entry, tl.sum(kept, 0))
    # FlexAttention looks at the first index even where there is none: column 0 is written to row 0 as well.
    slot = tl.maximum(tl.cumsum(kept, 0) - 1, 0)
    tl.store(full_indices + entry * width + slot, column, mask=(kept > 0) | (column == 0))
    tl.store(diagonal_counts + entry, 1)
    tl.store(diagonal_indices + entry * width, row)


@triton.jit
def _reaches(mass: tl.tensor, place: tl.tensor, threshold: tl.tensor, last_tie: tl.tensor) -> tl.tensor:
    """Tell which entries belong to the fewest that reach gamma."""
    threshold = tl.load(threshold)
    return (mass > threshold) | ((mass == threshold) & (place <= tl.load(last_tie)))


@triton.jit
def _fewest(mass: tl.tensor, gamma: float) -> tl.tensor:
    """Return the fewest entries of a vector that reach gamma of its sum; equal ones from the left."""
    bits = tl.maximum(mass.to(tl.int32, bitcast=True), 0)  # -0.0 is 0
    exact = mass.to(tl.float64)
    goal = tl.sum(exact, 0) * gamma
    low = tl.full([], 0, tl.int32)
    high = tl.max(bits, 0) + 1
    above = goal * 0
    while high - low > 1:
        middle = low + (high - low) // 2
        reached = tl.sum(tl.where(bits >= middle, exact, 0.0), 0)
        is_enough = reached >= goal
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle)
        above = tl.where(is_enough, above, reached)
    is_tie = bits == low
    ties_before = tl.cumsum(is_tie.to(tl.int32), 0) - 1
    threshold = low.to(tl.float32, bitcast=True).to(tl.float64)
    return (bits > low) | (is_tie & (above + ties_before.to(tl.float64) * threshold < goal))


@triton.jit
def _best(bits: tl.tensor, candidates: tl.tensor, count: int) -> tl.tensor:
    """Return the ``count`` best of the candidates, or all where there are fewer; equal ones from the left."""
    bits = tl.where(candidates, bits, -1)
    low = tl.full([], 0, tl.int32)
    kept = tl.sum(candidates.to(tl.int32), 0)
    high = tl.max(bits, 0) + 1
    while (kept > count) & (high - low > 1):
        middle = low + (high - low) // 2
        at_least = tl.sum((bits >= middle).to(tl.int32), 0)
        is_enough = at_least >= count
        low = tl.where(is_enough, middle, low)
        kept = tl.where(is_enough, at_least, kept)
        high = tl.where(is_enough, high, middle)
    is_tie = bits == low
    ties_needed = count - tl.sum((bits > low).to(tl.int32), 0)
    return (bits > low) | (is_tie & (tl.cumsum(is_tie.to(tl.int32), 0) <= ties_needed))
