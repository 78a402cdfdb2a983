"""Triton kernels that choose blocks: the pooled estimate, the thresholds that reach gamma, budgets and packing.

    estimate_attention    pooled query x pooled key -> the attention of query-aware heads
    find_thresholds       the mass from which on entries reach gamma, for each profile and each small map
    narrow_thresholds     the same for large maps, in several launches
    pack_blocks           thresholds, budgets, sink and diagonal -> FlexAttention's tables; or scores, with a threshold
                          for each row

Nothing is sorted. An entry is selected if its mass lies above a threshold, or equals it and stands no further right
than the last one needed. Masses are not negative, so that their float32 bits, read as integers, order them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flexprefill_compile.block_masks.triton_representative import EVERY_BLOCK, QUERY_AWARE

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
def find_thresholds(
    profiles: tl.tensor,
    estimate: tl.tensor,
    patterns: tl.tensor,
    thresholds: tl.tensor,
    last_ties: tl.tensor,
    gammas: tl.tensor,
    gamma: float,
    first_head: int,
    num_blocks: int,
    heads: int,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    SECTIONS: tl.constexpr,
    HAS_MAPS: tl.constexpr,
    HAS_GAMMAS: tl.constexpr,
) -> None:
    """Find the mass from which on the entries of a profile or a map reach gamma of its total. Grid: (2, heads).

    A vertical-slash head has two searches, columns and diagonals; a query-aware one has one, over its map, done here
    if HAS_MAPS, for small maps. Each round cuts the range of the threshold's bits into SECTIONS + 1 parts, until one
    value is left: exact, up to the rounding of float32 sums, about 1e-6 of the total. With HAS_GAMMAS, ``gammas`` holds
    gamma for each query head, (H,) float32, and ``gamma`` is not read.

    ``thresholds`` and ``last_ties`` are (B, H, 2): the threshold, and the last position at which an entry equal to it
    is still needed.
    """
    which = tl.program_id(0)
    estimate += tl.program_id(1).to(tl.int64) * num_blocks * num_blocks
    program = first_head + tl.program_id(1).to(tl.int64)
    pattern = tl.load(patterns + program)
    is_map = pattern == QUERY_AWARE
    if (pattern == EVERY_BLOCK) | (is_map & (which == 1)):
        return
    if is_map & (not HAS_MAPS):
        return
    if HAS_GAMMAS:
        gamma = tl.load(gammas + program % heads)
    values = profiles + (program * 2 + which) * num_blocks
    if is_map:
        values = estimate
    num_rows = tl.where(is_map, num_blocks, 1)
    num_entries = tl.where(is_map, num_blocks * (num_blocks + 1) // 2, num_blocks)

    cut = tl.arange(0, SECTIONS)
    total = tl.max(_mass_from(values, num_rows, num_blocks, is_map, cut * 0, TILE_ROWS, TILE_COLUMNS, SECTIONS), 0)
    needed = total.to(tl.float64) * gamma
    # Were every entry smaller, all of them together could be left out.
    low = (total * (1 - gamma) / num_entries * 0.999).to(tl.int32, bitcast=True)
    high = tl.full([], ABOVE_ONE, tl.int32)
    above = tl.full([], 0.0, tl.float32)
    while high - low > 1:
        step = (high - low + SECTIONS) // (SECTIONS + 1)
        mass = _mass_from(
            values, num_rows, num_blocks, is_map, low + step * (cut + 1), TILE_ROWS, TILE_COLUMNS, SECTIONS
        )
        low, high, above = _narrow(mass, needed, low, high, above, SECTIONS)

    threshold = low.to(tl.float32, bitcast=True)
    ties_needed = tl.ceil(((needed - above) / threshold).to(tl.float32)).to(tl.int32)
    last = _find_tie(values, num_rows, num_blocks, is_map, low, ties_needed, TILE_ROWS, TILE_COLUMNS)
    tl.store(thresholds + program * 2 + which, threshold)
    tl.store(last_ties + program * 2 + which, last)


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
    threshold. Entries equal to it are all selected. ``brackets`` is (turns, heads, 3) and ``masses``
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
        low, high, _ = _narrow(tl.sum(tl.load(masses + place).to(tl.float64), 0), needed, low, high, 0.0, SECTIONS)
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
def _narrow(
    mass: tl.tensor,
    needed: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    above: tl.tensor,
    SECTIONS: tl.constexpr,
) -> tl.tensor:
    """Narrow the bracket of the threshold's bits by the masses from each cut on.

    Returns:
        The lowest bits from which on the mass is as much as needed, for all that is known; the lowest known from which
        on it is less; and that lesser mass.
    """
    step = (high - low + SECTIONS) // (SECTIONS + 1)
    is_enough = mass >= needed
    above = tl.maximum(above, tl.max(tl.where(is_enough, 0.0, mass), 0))
    low += step * tl.sum(is_enough.to(tl.int32), 0)
    return low, tl.minimum(high, low + step), above


@triton.jit
def _load_tile(
    values: tl.tensor,
    row_start: int,
    column_start: int,
    num_rows: int,
    num_columns: int,
    is_map: tl.tensor,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Return the bits of a tile in row-major order, -1 where there is no entry, and the positions of its entries."""
    index = tl.arange(0, TILE_ROWS * TILE_COLUMNS)
    row = row_start + index // TILE_COLUMNS
    column = column_start + index % TILE_COLUMNS
    inside = (row < num_rows) & (column < tl.where(is_map, row + 1, num_columns))
    place = row * num_columns + column
    bits = tl.load(values + place, mask=inside, other=0.0).to(tl.int32, bitcast=True)
    return tl.where(inside, bits, -1), place


@triton.jit
def _mass_from(
    values: tl.tensor,
    num_rows: int,
    num_columns: int,
    is_map: tl.tensor,
    low_bits: tl.tensor,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    SECTIONS: tl.constexpr,
) -> tl.tensor:
    """Return the mass of the entries whose bits are at least each of ``low_bits``: (SECTIONS,)."""
    mass = tl.zeros([SECTIONS, TILE_ROWS * TILE_COLUMNS], tl.float32)
    for row_start in range(0, num_rows, TILE_ROWS):
        for column_start in range(0, tl.where(is_map, row_start + TILE_ROWS, num_columns), TILE_COLUMNS):
            bits, _ = _load_tile(
                values, row_start, column_start, num_rows, num_columns, is_map, TILE_ROWS, TILE_COLUMNS
            )
            entry = tl.maximum(bits, 0).to(tl.float32, bitcast=True)
            mass += tl.where(bits[None, :] >= low_bits[:, None], entry[None, :], 0.0)
    return tl.sum(mass, 1)


@triton.jit
def _find_tie(
    values: tl.tensor,
    num_rows: int,
    num_columns: int,
    is_map: tl.tensor,
    wanted: tl.tensor,
    count: tl.tensor,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Return the position of entry number ``count`` of those with the bits ``wanted``, or of the last there is."""
    last = tl.full([], -1, tl.int32)
    seen = tl.full([], 0, tl.int32)
    for row_start in range(0, num_rows, TILE_ROWS):
        for column_start in range(0, tl.where(is_map, row_start + TILE_ROWS, num_columns), TILE_COLUMNS):
            bits, place = _load_tile(
                values, row_start, column_start, num_rows, num_columns, is_map, TILE_ROWS, TILE_COLUMNS
            )
            is_tie = bits == wanted
            rank = seen + tl.cumsum(is_tie.to(tl.int32), 0)
            last = tl.maximum(last, tl.max(tl.where(is_tie & (rank <= count), place, -1), 0))
            seen += tl.sum(is_tie.to(tl.int32), 0)
    return last


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
