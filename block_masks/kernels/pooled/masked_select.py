"""The Triton kernel that selects by pooled keys under a mask: queries, means and kinds of blocks in, tables out.

A program scores two runs of tiles of key blocks, those in which its query blocks see something and what lies between
them, but for the first gap. Its masses lie in the memory of its tables.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .masked_rows import select_masked_rows
from .select import order_columns, sum_keys


@triton.jit
def select_by_masked_pools(
    query: tl.tensor,
    means: tl.tensor,
    log_weights: tl.tensor,
    kinds: tl.tensor,
    words: tl.tensor,
    query_counts: tl.tensor,
    last_rows: tl.tensor,
    offset: tl.tensor,
    gammas: tl.tensor,
    partial_counts: tl.tensor,
    partial_indices: tl.tensor,
    full_counts: tl.tensor,
    full_indices: tl.tensor,
    scale_log2e: float,
    cap_log2e: float,
    gamma: float,
    query_length: int,
    num_q_blocks: int,
    num_k_blocks: int,
    num_tiles: int,
    num_key_tiles: int,
    kv_heads: int,
    batch_kv_heads: int,
    pitch: int,
    min_blocks: int,
    max_blocks: int,
    dense_last: int,
    query_batch: tl.tensor,
    query_head: tl.tensor,
    query_token: tl.tensor,
    query_feature: tl.tensor,
    query_counts_batch: int,
    mask_batch: int,
    mask_head: int,
    last_rows_batch: int,
    last_rows_step: int,
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
    LOOKED: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_GAMMAS: tl.constexpr,
    HAS_CEILING: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
) -> None:
    """Score the sampled queries of some segments, choose their blocks and pack them.

    Segments and the grid of programs are those of ``select_by_pools``; ``means``, ``log_weights``, ``kinds`` and
    ``words`` are what ``read_masked_inputs`` writes. ``mask_batch`` and ``mask_head`` are the strides of the last two,
    in masks; ``last_rows`` is the last query of each query block's sequence.
    """
    samples: tl.constexpr = BLOCK // STRIDE
    num_own: tl.constexpr = ROWS // samples
    block_keys: tl.constexpr = BLOCK // POOL
    tile_blocks: tl.constexpr = COLUMNS // block_keys
    batch_kv = (tl.program_id(0) % batch_kv_heads).to(tl.int64)
    batch = batch_kv // kv_heads
    first_head = batch_kv % kv_heads * GROUP
    first_segment = (num_tiles - 1 - tl.program_id(0) // batch_kv_heads) * num_own
    num_segments = num_q_blocks * GROUP
    faults = means + tl.cast(batch_kv_heads, tl.int64) * pitch * HEAD_DIM
    means += batch_kv * pitch * HEAD_DIM
    log_weights += batch * pitch
    masses = full_indices.to(tl.pointer_type(tl.float32), bitcast=True)

    own = first_segment + tl.arange(0, num_own)
    is_own = own < num_segments
    own_entry = (batch_kv * GROUP + own % GROUP) * num_q_blocks + own // GROUP
    own_words = words + _find_mask_row(own, batch, first_head, mask_batch, mask_head, num_q_blocks, GROUP) * (
        num_key_tiles * 2
    )
    first_tile, gap, after, stop, sure, sure_stop = _find_tiles(own_words, is_own, num_key_tiles, tile_blocks, LOOKED)
    before_gap = gap - first_tile
    num_scored = before_gap + stop - after

    # The sampled queries: the middle of those that count of each STRIDE.
    row = tl.arange(0, ROWS)
    segment = first_segment + row // samples
    is_row = segment < num_segments
    start = segment // GROUP * BLOCK + row % samples * STRIDE
    token = tl.arange(0, STRIDE)
    place = query_counts + batch * query_counts_batch + start[:, None] + token[None, :]
    counts = tl.load(place, mask=is_row[:, None], other=0).to(tl.int32)
    number = tl.sum(counts, 1)
    is_middle = (counts > 0) & (tl.cumsum(counts, 1) == (number // 2 + 1)[:, None])
    position = start + tl.sum(tl.where(is_middle, token[None, :], 0), 1)
    query += batch * query_batch
    head = first_head + segment % GROUP
    place = head * query_head + tl.minimum(position, query_length - 1).to(tl.int64) * query_token
    feature = tl.arange(0, WIDTH)
    is_read = (number > 0)[:, None] & (feature < HEAD_DIM)[None, :]
    queries = tl.load(query + (place[:, None] + feature[None, :] * query_feature), mask=is_read, other=0)
    row_words = words + _find_mask_row(
        tl.where(is_row, segment, first_segment), batch, first_head, mask_batch, mask_head, num_q_blocks, GROUP
    ) * (num_key_tiles * 2)
    position += tl.load(offset).to(tl.int32)

    # The normaliser of each row.
    largest = tl.full([ROWS], -1e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for i in tl.range(0, num_scored, num_stages=NUM_STAGES):
        tile = i + tl.where(i < before_gap, first_tile, after - before_gap)
        is_sure = (tile >= sure) & (tile < sure_stop)
        scores = _score_masked_tile(
            queries, means, log_weights, row_words, tile, is_sure, position, scale_log2e, cap_log2e, POOL,
            block_keys, HEAD_DIM, WIDTH, COLUMNS, HAS_CAP, PRECISION,
        )  # fmt: skip
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        total = total * tl.exp2(largest - new_largest) + tl.sum(tl.exp2(scores - new_largest[:, None]), 1)
        largest = new_largest
    # A row weighs as much as the queries that it stands for. One that sees nothing, or that is none, has no mass.
    of_block = tl.sum(tl.reshape(number, [num_own, samples]), 1)
    of_block = tl.reshape(tl.broadcast_to(of_block[:, None], [num_own, samples]), [ROWS])
    weight = number.to(tl.float32) / tl.maximum(of_block, 1).to(tl.float32)
    has_mass = (number > 0) & (total != 0)
    log_total = largest + tl.log2(tl.where(has_mass, total, 1.0)) - tl.log2(tl.where(has_mass, weight, 1.0))
    log_total = tl.where(has_mass, log_total, float("inf"))

    # The mass of each block.
    for i in tl.range(0, num_scored, num_stages=NUM_STAGES):
        tile = i + tl.where(i < before_gap, first_tile, after - before_gap)
        is_sure = (tile >= sure) & (tile < sure_stop)
        scores = _score_masked_tile(
            queries, means, log_weights, row_words, tile, is_sure, position, scale_log2e, cap_log2e, POOL, block_keys,
            HEAD_DIM, WIDTH, COLUMNS, HAS_CAP, PRECISION,
        )  # fmt: skip
        mass = sum_keys(tl.exp2(scores - log_total[:, None]), ROWS, COLUMNS, block_keys)
        mass = tl.sum(tl.reshape(mass, [num_own, samples, tile_blocks]), 1)
        block = tile * tile_blocks + tl.arange(0, tile_blocks)
        is_there = is_own[:, None] & (block < num_k_blocks)[None, :]
        tl.store(masses + (own_entry * num_k_blocks)[:, None] + block[None, :], mass, mask=is_there)
    tl.debug_barrier()

    # A head whose keys or values are not all finite computes every possible block.
    block = tl.arange(0, NUM_BLOCKS)
    fault = tl.load(faults + batch_kv * num_k_blocks + block, mask=block < num_k_blocks, other=0).to(tl.float32)
    if HAS_VALUE:
        of_value = faults + (batch_kv_heads + batch_kv) * num_k_blocks
        fault += tl.load(of_value + block, mask=block < num_k_blocks, other=0).to(tl.float32)
    worst = tl.max(tl.where(fault > 0, float("inf"), 0.0), 0)

    last_rows += batch * last_rows_batch
    for part in range(num_own // AT_ONCE):
        chosen = first_segment + part * AT_ONCE + tl.arange(0, AT_ONCE)
        mask_row = _find_mask_row(chosen, batch, first_head, mask_batch, mask_head, num_q_blocks, GROUP)
        select_masked_rows(
            chosen, mask_row, worst, kinds, last_rows, gammas, gamma, masses, partial_counts, partial_indices,
            full_counts, full_indices, batch_kv * GROUP, first_head, num_q_blocks, num_k_blocks, min_blocks, max_blocks,
            dense_last, last_rows_step, BLOCK, GROUP, NUM_BLOCKS, AT_ONCE, HAS_GAMMAS, HAS_CEILING,
        )  # fmt: skip


@triton.jit
def _find_mask_row(
    segment: tl.tensor,
    batch: tl.tensor,
    first_head: tl.tensor,
    mask_batch: int,
    mask_head: int,
    num_q_blocks: int,
    GROUP: tl.constexpr,
) -> tl.tensor:
    """Return which row of ``kinds`` and ``words`` is a segment's."""
    mask = batch * mask_batch + (first_head + segment % GROUP) * mask_head
    return mask * num_q_blocks + segment // GROUP


@triton.jit
def _find_tiles(
    own_words: tl.tensor, is_own: tl.tensor, num_key_tiles: int, TILE_BLOCKS: tl.constexpr, AT_ONCE: tl.constexpr
) -> tl.tensor:
    """Find the tiles in which some row sees something.

    Returns:
        The first and the end of a run of them, the start and the end of what follows after a gap, and the first and the
        end of a run of tiles of which each row sees all.
    """
    stop = tl.full([], 0, tl.int32)
    first = stop + num_key_tiles
    sure = first
    for start in range(0, num_key_tiles, AT_ONCE):
        tile, is_some, is_all = _look_at_tiles(own_words, is_own, start, num_key_tiles, TILE_BLOCKS, AT_ONCE)
        first = tl.minimum(first, tl.min(tl.where(is_some, tile, num_key_tiles), 0))
        stop = tl.maximum(stop, tl.max(tl.where(is_some, tile + 1, 0), 0))
        sure = tl.minimum(sure, tl.min(tl.where(is_all, tile, num_key_tiles), 0))
    gap, sure_stop = stop, stop
    for start in range(0, num_key_tiles, AT_ONCE):
        tile, is_some, is_all = _look_at_tiles(own_words, is_own, start, num_key_tiles, TILE_BLOCKS, AT_ONCE)
        gap = tl.minimum(gap, tl.min(tl.where((tile > first) & (is_some == 0), tile, num_key_tiles), 0))
        sure_stop = tl.minimum(sure_stop, tl.min(tl.where((tile > sure) & (is_all == 0), tile, num_key_tiles), 0))
    after = stop
    for start in range(gap // AT_ONCE * AT_ONCE, stop, AT_ONCE):
        tile, is_some, is_all = _look_at_tiles(own_words, is_own, start, num_key_tiles, TILE_BLOCKS, AT_ONCE)
        after = tl.minimum(after, tl.min(tl.where((tile > gap) & is_some, tile, num_key_tiles), 0))
    return first, gap, after, stop, sure, sure_stop


@triton.jit
def _look_at_tiles(
    own_words: tl.tensor,
    is_own: tl.tensor,
    start: tl.tensor,
    num_key_tiles: int,
    TILE_BLOCKS: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> tl.tensor:
    """Return AT_ONCE tiles, and of each whether some row sees something of it, and whether all rows see all of it."""
    every_bit: tl.constexpr = -1 if TILE_BLOCKS == 32 else (1 << TILE_BLOCKS) - 1
    tile = start + tl.arange(0, AT_ONCE)
    place = own_words[:, None] + tile[None, :] * 2
    is_read = is_own[:, None] & (tile < num_key_tiles)[None, :]
    seen = tl.load(place, mask=is_read, other=0)
    unsure = tl.load(place + 1, mask=is_read, other=0)
    is_some = tl.max(((seen | unsure) != 0).to(tl.int32), 0) > 0
    is_whole = ((seen == every_bit) & (unsure == 0)) | (is_own == 0)[:, None]
    return tile, is_some, (tl.min(is_whole.to(tl.int32), 0) > 0) & (tile < num_key_tiles)


@triton.jit
def _score_masked_tile(
    queries: tl.tensor,
    means: tl.tensor,
    log_weights: tl.tensor,
    row_words: tl.tensor,
    tile: tl.tensor,
    is_sure: tl.tensor,
    position: tl.tensor,
    scale_log2e: float,
    cap_log2e: float,
    POOL: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Return the scores of a tile as powers of two, (ROWS, COLUMNS) float32, in the order of ``order_columns``.

    ``row_words`` points to the words of each row. Of a tile that ``is_sure``, each row sees all.
    """
    column = order_columns(COLUMNS, KEYS)
    pool = tile * COLUMNS + column
    feature = tl.arange(0, WIDTH)
    place = means + (pool * HEAD_DIM)[:, None] + feature[None, :]
    keys = tl.load(place, mask=(feature < HEAD_DIM)[None, :], other=0)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale_log2e
    if HAS_CAP:  # cap * tanh(score / cap); the hyperbolic tangent of x is 1 - 2 / (exp(2 x) + 1)
        scores = cap_log2e - 2 * cap_log2e / (tl.exp2(scores * (2.8853900817779268 / cap_log2e)) + 1)
    if is_sure == 0:
        seen = tl.load(row_words + tile * 2)
        unsure = tl.load(row_words + tile * 2 + 1)
        # Of a block that the mask may cut, the means of keys up to the query's position are taken for seen.
        is_before = (pool * POOL)[None, :] <= position[:, None]
        word = tl.where(is_before, (seen | unsure)[:, None], seen[:, None])
        is_seen = ((word >> (column // KEYS)[None, :]) & 1) != 0
        scores = tl.where(is_seen, scores + tl.load(log_weights + pool)[None, :], float("-inf"))
    return scores
