"""Triton kernels for query-aware heads: the map of a head's pooled attention, and the threshold that reaches gamma.

    estimate_attention      pooled query x pooled key -> maps
    find_map_thresholds     of maps that one program can hold
    narrow_thresholds       of larger ones, by several programs in several launches

Heads of another pattern leave these kernels at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..thresholds import find_threshold
from .patterns import QUERY_AWARE

ABOVE_ONE = tl.constexpr(0x3F800100)  # bits of a float32 just above 1, which no mass exceeds


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


@triton.jit
def narrow_thresholds(
    estimate: tl.tensor,
    patterns: tl.tensor,
    brackets: tl.tensor,
    masses: tl.tensor,
    thresholds: tl.tensor,
    last_ties: tl.tensor,
    gammas: tl.tensor,
    gamma: float,
    lowest: int,
    turn: int,
    num_turns: int,
    first_head: int,
    num_blocks: int,
    heads: int,
    TILE: tl.constexpr,
    CHUNKS: tl.constexpr,
    SECTIONS: tl.constexpr,
    HAS_GAMMAS: tl.constexpr,
) -> None:
    """Take one turn of the search over large maps, by several programs a head. Grid: (CHUNKS, heads).

    Each turn reads the masses that the turn before left, narrows the bracket, and sums anew; the last one writes the
    threshold. Entries equal to it are all selected. ``brackets`` is (turns, heads, 2) and ``masses``
    (turns, heads, CHUNKS, SECTIONS), float32.
    """
    chunk = tl.program_id(0)
    local = tl.program_id(1).to(tl.int64)
    program = first_head + local
    if tl.load(patterns + program) != QUERY_AWARE:
        return
    if HAS_GAMMAS:
        gamma = tl.load(gammas + program % heads)
    cut = tl.arange(0, SECTIONS)
    low = tl.full([], 0, tl.int32) + lowest
    high = tl.full([], ABOVE_ONE, tl.int32)
    if turn > 0:
        before = (turn - 1) * tl.num_programs(1) + local
        low = tl.load(brackets + before * 2)
        high = tl.load(brackets + before * 2 + 1)
        place = before * CHUNKS * SECTIONS + tl.arange(0, CHUNKS)[:, None] * SECTIONS + cut[None, :]
        # A row of the map sums to 1.
        needed = tl.cast(num_blocks, tl.float64) * gamma
        low, high = _narrow(tl.sum(tl.load(masses + place).to(tl.float64), 0), needed, low, high, SECTIONS)
    if turn == num_turns:
        if chunk == 0:
            tl.store(thresholds + program * 2, low.to(tl.float32, bitcast=True))
            tl.store(last_ties + program * 2, num_blocks * num_blocks)
        return
    now = turn * tl.num_programs(1) + local
    if chunk == 0:
        tl.store(brackets + now * 2, low)
        tl.store(brackets + now * 2 + 1, high)
    low_bits = low + (high - low + SECTIONS) // (SECTIONS + 1) * (cut + 1)
    estimate += local * num_blocks * num_blocks
    mass = tl.zeros([SECTIONS, TILE], tl.float32)
    for row in range(chunk, num_blocks, CHUNKS):
        for start in range(0, row + 1, TILE):
            column = start + tl.arange(0, TILE)
            entry = tl.load(estimate + row * num_blocks + column, mask=column <= row, other=0.0)
            bits = entry.to(tl.int32, bitcast=True)
            mass += tl.where(bits[None, :] >= low_bits[:, None], entry[None, :], 0.0)
    tl.store(masses + (now * CHUNKS + chunk) * SECTIONS + cut, tl.sum(mass, 1))


@triton.jit
def _narrow(mass: tl.tensor, needed: tl.tensor, low: tl.tensor, high: tl.tensor, SECTIONS: tl.constexpr) -> tl.tensor:
    """Narrow the bracket of the threshold's bits by the masses from each cut on.

    Returns:
        The lowest bits from which on the mass is as much as needed, for all that is known, and the lowest known from
        which on it is less.
    """
    step = (high - low + SECTIONS) // (SECTIONS + 1)
    low += step * tl.sum((mass >= needed).to(tl.int32), 0)
    return low, tl.minimum(high, low + step)
