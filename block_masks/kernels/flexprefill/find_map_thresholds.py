"""The Triton kernel that finds the threshold of a map that one program can hold, and its launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import next_power_of_2
from ..thresholds import find_threshold
from .buffers import SelectionBuffers
from .choose_patterns import QUERY_AWARE


def launch_find_map_thresholds(buffers: SelectionBuffers, maps: Tensor, first: int, count: int) -> None:
    """Find the thresholds of the maps of ``count`` heads of B * H, from number ``first`` on."""
    columns = max(16, next_power_of_2(buffers.num_blocks))
    buffers.run(
        find_map_thresholds,
        (count,),
        {
            "estimate": maps,
            "patterns": buffers.patterns,
            "thresholds": buffers.thresholds,
            "last_ties": buffers.last_ties,
            "gammas": buffers.gammas,
            "gamma": buffers.config.gammas[0],
            "first_head": first,
            "num_blocks": buffers.num_blocks,
            "heads": buffers.heads,
            "ROWS": columns // 2,
            "COLUMNS": columns,
            "HAS_GAMMAS": buffers.has_gammas,
        },
        num_warps=max(4, columns // 8),
    )


@triton.jit
def find_map_thresholds(
    estimate: tl.tensor,
    patterns: tl.tensor,
    thresholds: tl.tensor,
    last_ties: tl.tensor,
    gammas: tl.tensor,
    gamma: float,
    first_head: int,
    num_blocks: int,
    heads: int,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_GAMMAS: tl.constexpr,
) -> None:
    """Find the threshold of a query-aware head's map. Grid: (heads,).

    The map's triangle, which lies in the registers of one program, is folded: rows r and num_blocks - 1 - r stand side
    by side in (ROWS, COLUMNS), without the diagonal, which is held apart. With HAS_GAMMAS, ``gammas`` holds gamma for
    each query head, (H,) float32, and ``gamma`` is not read. ``thresholds`` and ``last_ties`` are (B, H, 2), of which
    the first is written.
    """
    local = tl.program_id(0).to(tl.int64)
    program = first_head + local
    if tl.load(patterns + program) != QUERY_AWARE:
        return
    if HAS_GAMMAS:
        gamma = tl.load(gammas + program % heads)
    estimate += local * num_blocks * num_blocks
    index = tl.arange(0, ROWS * COLUMNS)
    upper = index // COLUMNS
    column = index % COLUMNS
    lower = num_blocks - 1 - upper
    is_lower = column >= upper
    column = tl.where(is_lower, column - upper, column)
    inside = (2 * upper < num_blocks) & (~is_lower | ((upper < lower) & (column < lower)))
    place = tl.where(is_lower, lower, upper) * num_blocks + column
    bits = tl.load(estimate + place, mask=inside, other=0.0).to(tl.int32, bitcast=True)
    block = tl.arange(0, COLUMNS)
    on_diagonal = block * (num_blocks + 1)
    rest = tl.load(estimate + on_diagonal, mask=block < num_blocks, other=0.0).to(tl.int32, bitcast=True)
    threshold, last = find_threshold(
        tl.where(inside, bits, -1),
        place,
        gamma,
        num_blocks * (num_blocks + 1) // 2,
        tl.where(block < num_blocks, rest, -1),
        on_diagonal,
    )
    tl.store(thresholds + program * 2, threshold)
    tl.store(last_ties + program * 2, last)
