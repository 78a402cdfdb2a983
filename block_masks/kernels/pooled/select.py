"""The Triton kernel that selects by pooled keys: queries and means in, FlexAttention's tables out."""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import choose_in_rows, keep_best


@triton.jit
def select_by_pools(
    query: tl.tensor,
    means: tl.tensor,
    gammas: tl.tensor,
    masses: tl.tensor,
    diagonal_counts: tl.tensor,
    diagonal_indices: tl.tensor,
    full_counts: tl.tensor,
    full_indices: tl.tensor,
    scale_log2e: float,
    gamma: float,
    length: int,
    num_blocks: int,
    last_tile: int,
    kv_heads: int,
    batch_kv_heads: int,
    pitch: int,
    first_mass_block: int,
    mass_blocks: int,
    mass_width: int,
    width: int,
    min_blocks: int,
    max_blocks: int,
    first_dense: int,
    query_batch: tl.tensor,
    query_head: tl.tensor,
    query_token: tl.tensor,
    query_feature: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    POOL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    HAS_GAMMAS: tl.constexpr,
    HAS_CEILING: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
) -> None:
    """Score the sampled queries of some segments, choose their blocks and pack them.

    A segment is a query block of one head. Those of the heads that share a key head follow each other: (query block,
    head of the group). Grid: (tiles of segments * B * Hkv,), from ``last_tile`` down: the longest rows first.

    ``means`` is what ``pool_keys`` writes, ``pitch`` a multiple of COLUMNS. ``masses`` is (B, H, mass_blocks,
    mass_width) int32, room for as many float32, for the query blocks from ``first_mass_block`` on; it may be
    ``full_indices``.
    """
    samples: tl.constexpr = BLOCK // STRIDE
    num_own: tl.constexpr = ROWS // samples
    block_keys: tl.constexpr = BLOCK // POOL
    batch_kv = (tl.program_id(0) % batch_kv_heads).to(tl.int64)
    first_segment = (last_tile - tl.program_id(0) // batch_kv_heads) * num_own
    num_segments = num_blocks * GROUP
    first_head = batch_kv * GROUP  # of B * H
    last_block = tl.minimum(first_segment + num_own - 1, num_segments - 1) // GROUP
    faults = means + tl.cast(batch_kv_heads, tl.int64) * pitch * HEAD_DIM
    means += batch_kv * pitch * HEAD_DIM
    masses = masses.to(tl.pointer_type(tl.float32), bitcast=True)

    # The sampled queries.
    row = tl.arange(0, ROWS)
    segment = first_segment + row // samples
    block_start = segment // GROUP * BLOCK
    start = block_start + row % samples * STRIDE
    number = tl.where(segment < num_segments, tl.minimum(length - start, STRIDE), 0)
    position = tl.minimum(start + number // 2, length - 1)
    last_pool = tl.maximum(position, 0) // POOL
    query += batch_kv // kv_heads * query_batch
    head = (batch_kv % kv_heads) * GROUP + segment % GROUP
    place = head * query_head + position.to(tl.int64) * query_token
    feature = tl.arange(0, WIDTH)
    is_read = (number > 0)[:, None] & (feature < HEAD_DIM)[None, :]
    queries = tl.load(query + (place[:, None] + feature[None, :] * query_feature), mask=is_read, other=0)

    # The normaliser of each row. Every row sees the first mean, so that none is left without.
    sure = first_segment // GROUP * block_keys
    stop = ((last_block + 1) * block_keys + COLUMNS - 1) // COLUMNS
    largest = tl.full([ROWS], -1e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for tile in tl.range(0, stop, num_stages=NUM_STAGES):
        scores = _score_tile(
            queries, means, tile * COLUMNS, sure, last_pool, length, scale_log2e, POOL, block_keys, HEAD_DIM, WIDTH,
            COLUMNS, PRECISION,
        )  # fmt: skip
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        total = total * tl.exp2(largest - new_largest) + tl.sum(tl.exp2(scores - new_largest[:, None]), 1)
        largest = new_largest
    # A row weighs as much as the queries that it stands for.
    weight = number.to(tl.float32) / tl.maximum(tl.minimum(length - block_start, BLOCK), 1).to(tl.float32)
    log_total = largest + tl.log2(total) - tl.log2(tl.maximum(weight, 1e-30))

    # The mass of each block.
    tile_blocks: tl.constexpr = COLUMNS // block_keys
    own = first_segment + tl.arange(0, num_own)
    own_block = own // GROUP
    mass_row = (first_head + own % GROUP) * mass_blocks + own_block - first_mass_block
    is_own = own < num_segments
    for tile in tl.range(0, stop, num_stages=NUM_STAGES):
        scores = _score_tile(
            queries, means, tile * COLUMNS, sure, last_pool, length, scale_log2e, POOL, block_keys, HEAD_DIM, WIDTH,
            COLUMNS, PRECISION,
        )  # fmt: skip
        mass = sum_keys(tl.exp2(scores - log_total[:, None]), ROWS, COLUMNS, block_keys)
        mass = tl.sum(tl.reshape(mass, [num_own, samples, tile_blocks]), 1)
        block = tile * tile_blocks + tl.arange(0, tile_blocks)
        is_seen = is_own[:, None] & (block[None, :] <= own_block[:, None])
        tl.store(masses + (mass_row * mass_width)[:, None] + block[None, :], mass, mask=is_seen)
    tl.debug_barrier()

    # A head whose keys or values are not all finite computes every block, under a ceiling those first that are not.
    block = tl.arange(0, NUM_BLOCKS)
    fault = tl.load(faults + batch_kv * num_blocks + block, mask=block < num_blocks, other=0).to(tl.float32)
    if HAS_VALUE:
        of_value = faults + (batch_kv_heads + batch_kv) * num_blocks
        fault += tl.load(of_value + block, mask=block < num_blocks, other=0).to(tl.float32)
    worst = tl.max(tl.where(fault > 0, float("inf"), 0.0), 0)

    for part in range(num_own // AT_ONCE):
        first = first_segment + part * AT_ONCE
        _select_rows(
            first + tl.arange(0, AT_ONCE), fault, worst, gammas, gamma, masses, diagonal_counts, diagonal_indices,
            full_counts, full_indices, first_head, batch_kv % kv_heads * GROUP, num_blocks, first_mass_block,
            mass_blocks, mass_width, width, min_blocks, max_blocks, first_dense, GROUP, NUM_BLOCKS, AT_ONCE, HAS_GAMMAS,
            HAS_CEILING,
        )  # fmt: skip


@triton.jit
def _select_rows(
    segment: tl.tensor,
    fault: tl.tensor,
    worst: tl.tensor,
    gammas: tl.tensor,
    gamma: float,
    masses: tl.tensor,
    diagonal_counts: tl.tensor,
    diagonal_indices: tl.tensor,
    full_counts: tl.tensor,
    full_indices: tl.tensor,
    first_head: tl.tensor,
    first_gamma: tl.tensor,
    num_blocks: int,
    first_mass_block: int,
    mass_blocks: int,
    mass_width: int,
    width: int,
    min_blocks: int,
    max_blocks: int,
    first_dense: int,
    GROUP: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    HAS_GAMMAS: tl.constexpr,
    HAS_CEILING: tl.constexpr,
) -> None:
    """Choose the blocks of AT_ONCE segments by their masses, and pack them."""
    block = tl.arange(0, NUM_BLOCKS)
    is_there = segment < num_blocks * GROUP
    query_block = segment // GROUP
    entry = (first_head + segment % GROUP) * num_blocks + query_block
    seen = is_there[:, None] & (block[None, :] <= query_block[:, None])
    mass_row = (first_head + segment % GROUP) * mass_blocks + query_block - first_mass_block
    mass = tl.load(masses + (mass_row * mass_width)[:, None] + block[None, :], mask=seen, other=0.0)
    # The same where a row itself is not finite: NaN in its queries reaches no other row.
    is_finite = tl.sum(mass, 1) + worst < float("inf")
    mass = tl.where(is_finite[:, None], mass, fault[None, :])
    optional = seen & (block > 0)[None, :] & (block[None, :] < query_block[:, None])
    own_gamma = tl.full([AT_ONCE], gamma, tl.float32)
    if HAS_GAMMAS:
        own_gamma = tl.load(gammas + first_gamma + segment % GROUP)
    takes_all = (query_block >= first_dense) | (own_gamma == 1) | ~is_finite
    sought = tl.where(takes_all[:, None], 0.0, mass)
    selected = choose_in_rows(sought, optional, own_gamma, min_blocks)
    selected = (selected | takes_all[:, None]) & optional
    if HAS_CEILING:
        selected = keep_best(mass, selected, max_blocks)
    selected |= (block == 0)[None, :] & (query_block > 0)[:, None] & is_there[:, None]  # the sink
    kept = selected.to(tl.int32)
    tl.store(full_counts + entry, tl.sum(kept, 1), mask=is_there)
    # FlexAttention looks at the first index even where there is none: column 0 is written to row 0 as well.
    slot = tl.maximum(tl.cumsum(kept, 1) - 1, 0)
    is_kept = (selected | (block == 0)[None, :]) & is_there[:, None]
    places = (entry * width)[:, None] + slot
    tl.store(full_indices + places, tl.broadcast_to(block[None, :], places.shape), mask=is_kept)
    tl.store(diagonal_counts + entry, tl.full([AT_ONCE], 1, tl.int32), mask=is_there)
    tl.store(diagonal_indices + entry * width, query_block, mask=is_there)


@triton.jit
def _score_tile(
    queries: tl.tensor,
    means: tl.tensor,
    first: int,
    sure: int,
    last_pool: tl.tensor,
    length: int,
    scale_log2e: float,
    POOL: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Return the scores of a tile as powers of two, (ROWS, COLUMNS) float32, in the order of ``order_columns``.

    Means before ``sure`` are seen by every row, and are those of POOL keys.
    """
    pool = first + order_columns(COLUMNS, KEYS)
    feature = tl.arange(0, WIDTH)
    place = means + (pool * HEAD_DIM)[:, None] + feature[None, :]
    keys = tl.load(place, mask=(feature < HEAD_DIM)[None, :], other=0)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale_log2e
    if first + COLUMNS > sure:
        # The last mean of a prompt weighs less if it is one of fewer keys.
        last = (length - 1) // POOL
        log_weight = tl.log2(tl.cast(length - last * POOL, tl.float32) / POOL)
        scores += tl.where(pool == last, log_weight, 0.0)[None, :]
        scores = tl.where(pool[None, :] <= last_pool[:, None], scores, float("-inf"))
    return scores


@triton.jit
def order_columns(COLUMNS: tl.constexpr, KEYS: tl.constexpr) -> tl.tensor:
    """Return which mean of a tile stands in which of its columns.

    A thread holds columns 2t, 2t + 1 of each 8 of a product. In this order it holds all the means of a block, so that
    no thread asks another for their sum.
    """
    column = tl.arange(0, COLUMNS)
    if KEYS >= 4 and COLUMNS >= 4 * KEYS:
        block = column // (4 * KEYS) * 4 + column // 2 % 4
        mean = block * KEYS + column // 8 % (KEYS // 2) * 2 + column % 2
    else:
        mean = column
    return mean


@triton.jit
def sum_keys(mass: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr, KEYS: tl.constexpr) -> tl.tensor:
    """Sum the columns of each block: (ROWS, COLUMNS), in the order of ``order_columns``, to (ROWS, COLUMNS / KEYS)."""
    if KEYS >= 4 and COLUMNS >= 4 * KEYS:
        fours: tl.constexpr = COLUMNS // (4 * KEYS)
        mass = tl.sum(tl.reshape(mass, [ROWS, fours, KEYS // 2, 4, 2]), 4)
        of_block = tl.reshape(tl.sum(mass, 2), [ROWS, COLUMNS // KEYS])
    else:
        of_block = tl.sum(tl.reshape(mass, [ROWS, COLUMNS // KEYS, KEYS]), 2)
    return of_block
