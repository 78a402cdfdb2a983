"""The Triton kernel that reads what selection under a mask needs: counted keys, faults, and the kind of each block.

    keys, their counts       means of POOL keys and the logs of their weights
    keys, values             which blocks hold NaN or inf
    certain, possible, ...   the kind of each block, and two bits of it for the tiles of ``masked_select.py``

All three run side by side in one launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .keys import find_fault, load_tokens

# The kind of a block, a sum of these.
CERTAIN = tl.constexpr(1)
REQUIRED = tl.constexpr(2)
CANDIDATE = tl.constexpr(4)
POSSIBLE = tl.constexpr(8)


@triton.jit
def read_masked_inputs(
    key: tl.tensor,
    value: tl.tensor,
    certain: tl.tensor,
    possible: tl.tensor,
    required: tl.tensor,
    key_counts: tl.tensor,
    query_counts: tl.tensor,
    first_block: tl.tensor,
    means: tl.tensor,
    log_weights: tl.tensor,
    kinds: tl.tensor,
    words: tl.tensor,
    key_length: int,
    num_q_blocks: int,
    num_k_blocks: int,
    kv_heads: int,
    batch_kv_heads: int,
    pitch: int,
    num_key_tiles: int,
    num_mark_rows: int,
    mask_heads: int,
    key_batch: tl.tensor,
    key_head: tl.tensor,
    key_token: tl.tensor,
    key_feature: tl.tensor,
    value_batch: tl.tensor,
    value_head: tl.tensor,
    value_token: tl.tensor,
    value_feature: tl.tensor,
    certain_batch: int,
    certain_head: int,
    possible_batch: int,
    possible_head: int,
    required_batch: int,
    required_head: int,
    key_counts_batch: int,
    query_counts_batch: int,
    first_block_batch: int,
    first_block_step: int,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    POOL: tl.constexpr,
    TOKENS: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    MARK_ROWS: tl.constexpr,
) -> None:
    """Pool a block of keys, look through a block of values, or mark a tile of the grid of blocks.

    Grid: (num_k_blocks * B * Hkv, with values twice, + num_key_tiles * num_mark_rows * B|1 * H|1,).

    ``means`` is (B * Hkv, pitch, D) in the dtype of the keys, and behind them (2, B * Hkv, num_k_blocks) faults, of
    keys and of values, as of ``pool_keys``. ``log_weights`` is (B, pitch) float32, the base 2 log of the share of POOL
    keys that count. ``kinds`` is (B|1, H|1, num_q_blocks, num_k_blocks) uint8. ``words`` is (B|1, H|1, num_q_blocks,
    num_key_tiles, 2) int32: a tile has TILE_BLOCKS key blocks, at most 32, and of each a bit in two words. The first
    says that all of the block's counted keys are seen. The second says that the block needs a closer look: keys up to
    the query's position are seen, or not all of its keys count.
    """
    num_parts = num_k_blocks * batch_kv_heads
    program = tl.program_id(0)
    marker = program - num_parts
    if HAS_VALUE:
        marker -= num_parts
    faults = means + tl.cast(batch_kv_heads, tl.int64) * pitch * HEAD_DIM
    if marker >= 0:
        _mark_tile(
            marker, certain, possible, required, key_counts, query_counts, first_block, kinds, words, num_q_blocks,
            num_k_blocks, num_key_tiles, num_mark_rows, mask_heads, certain_batch, certain_head, possible_batch,
            possible_head, required_batch, required_head, key_counts_batch, query_counts_batch, first_block_batch,
            first_block_step, BLOCK, TILE_BLOCKS, MARK_ROWS,
        )  # fmt: skip
    elif program < num_parts:
        block = program % num_k_blocks
        batch_kv = (program // num_k_blocks).to(tl.int64)
        batch, kv_head = batch_kv // kv_heads, batch_kv % kv_heads
        fault = _pool_counted_keys(
            key + batch * key_batch + kv_head * key_head, key_counts + batch * key_counts_batch,
            means + batch_kv * pitch * HEAD_DIM, log_weights + batch * pitch, block, kv_head, key_length, key_token,
            key_feature, HEAD_DIM, WIDTH, BLOCK, POOL, TOKENS,
        )  # fmt: skip
        tl.store(faults + program, fault.to(means.dtype.element_ty))
    else:
        block = (program - num_parts) % num_k_blocks
        batch_kv = ((program - num_parts) // num_k_blocks).to(tl.int64)
        value += batch_kv // kv_heads * value_batch + batch_kv % kv_heads * value_head
        fault = tl.full([], 0, tl.int32)
        for part in tl.static_range(BLOCK // TOKENS):
            first = block * BLOCK + part * TOKENS
            values = load_tokens(value, first, key_length, value_token, value_feature, VALUE_DIM, VALUE_WIDTH, TOKENS)
            fault = tl.maximum(fault, find_fault(values.to(tl.float32)))
        tl.store(faults + program, fault.to(means.dtype.element_ty))


@triton.jit
def _pool_counted_keys(
    key: tl.tensor,
    key_counts: tl.tensor,
    means: tl.tensor,
    log_weights: tl.tensor,
    block: tl.tensor,
    kv_head: tl.tensor,
    key_length: int,
    key_token: tl.tensor,
    key_feature: tl.tensor,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    POOL: tl.constexpr,
    TOKENS: tl.constexpr,
) -> tl.tensor:
    """Average the keys that count of each POOL of a block; return 1 if any key is NaN or infinite, else 0."""
    feature = tl.arange(0, WIDTH)
    fault = tl.full([], 0, tl.int32)
    for part in tl.static_range(BLOCK // TOKENS):
        first = block * BLOCK + part * TOKENS
        keys = load_tokens(key, first, key_length, key_token, key_feature, HEAD_DIM, WIDTH, TOKENS).to(tl.float32)
        # Of padding too: dense attention multiplies it by zero, and NaN times zero is NaN.
        fault = tl.maximum(fault, find_fault(keys))
        counts = tl.load(key_counts + first + tl.arange(0, TOKENS)).to(tl.int32)
        keys = tl.where((counts > 0)[:, None], keys, 0.0)
        total = tl.sum(tl.reshape(keys, [TOKENS // POOL, POOL, WIDTH]), 1)
        number = tl.sum(tl.reshape(counts, [TOKENS // POOL, POOL]), 1)
        mean = total / tl.maximum(number, 1).to(tl.float32)[:, None]
        pool = first // POOL + tl.arange(0, TOKENS // POOL)
        place = pool[:, None] * HEAD_DIM + feature[None, :]
        tl.store(means + place, mean.to(means.dtype.element_ty), mask=(feature < HEAD_DIM)[None, :])
        if kv_head == 0:
            log_weight = tl.log2(tl.maximum(number, 1).to(tl.float32) / POOL)
            tl.store(log_weights + pool, tl.where(number > 0, log_weight, float("-inf")))
    return fault


@triton.jit
def _mark_tile(
    marker: tl.tensor,
    certain: tl.tensor,
    possible: tl.tensor,
    required: tl.tensor,
    key_counts: tl.tensor,
    query_counts: tl.tensor,
    first_block: tl.tensor,
    kinds: tl.tensor,
    words: tl.tensor,
    num_q_blocks: int,
    num_k_blocks: int,
    num_key_tiles: int,
    num_mark_rows: int,
    mask_heads: int,
    certain_batch: int,
    certain_head: int,
    possible_batch: int,
    possible_head: int,
    required_batch: int,
    required_head: int,
    key_counts_batch: int,
    query_counts_batch: int,
    first_block_batch: int,
    first_block_step: int,
    BLOCK: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    MARK_ROWS: tl.constexpr,
) -> None:
    """Write the kinds and the words of MARK_ROWS query blocks and TILE_BLOCKS key blocks of one mask."""
    key_tile = marker % num_key_tiles
    query_block = marker // num_key_tiles % num_mark_rows * MARK_ROWS + tl.arange(0, MARK_ROWS)
    batch_head = (marker // num_key_tiles // num_mark_rows).to(tl.int64)
    batch, head = batch_head // mask_heads, batch_head % mask_heads
    column = tl.arange(0, TILE_BLOCKS)
    key_block = key_tile * TILE_BLOCKS + column
    is_row, is_column = query_block < num_q_blocks, key_block < num_k_blocks

    token = tl.arange(0, BLOCK)
    place = query_counts + batch * query_counts_batch + (query_block * BLOCK)[:, None] + token[None, :]
    num_queries = tl.sum(tl.load(place, mask=is_row[:, None], other=0).to(tl.int32), 1)
    place = key_counts + batch * key_counts_batch + (key_block * BLOCK)[:, None] + token[None, :]
    num_keys = tl.sum(tl.load(place, mask=is_column[:, None], other=0).to(tl.int32), 1)
    first_block += batch * first_block_batch
    of_row = tl.load(first_block + query_block * first_block_step, mask=is_row, other=-1)
    of_column = tl.load(first_block + key_block * first_block_step, mask=is_column, other=-2)

    is_block = is_row[:, None] & is_column[None, :]
    place = query_block.to(tl.int64)[:, None] * num_k_blocks + key_block[None, :]
    is_certain = tl.load(certain + batch * certain_batch + head * certain_head + place, mask=is_block, other=0) != 0
    is_possible = tl.load(possible + batch * possible_batch + head * possible_head + place, mask=is_block, other=0) != 0
    is_required = tl.load(required + batch * required_batch + head * required_head + place, mask=is_block, other=0) != 0
    # As ``list_candidates`` has it.
    is_candidate = is_possible & (num_queries > 0)[:, None] & (num_keys > 0)[None, :]
    is_candidate &= of_row[:, None] == of_column[None, :]

    kind = tl.where(is_certain, CERTAIN, 0) + tl.where(is_required, REQUIRED, 0)
    kind += tl.where(is_candidate, CANDIDATE, 0) + tl.where(is_possible, POSSIBLE, 0)
    first_row = batch_head * num_q_blocks
    tl.store(kinds + first_row * num_k_blocks + place, kind.to(tl.uint8), mask=is_block)
    is_partial = tl.where(is_certain, (num_keys < BLOCK)[None, :], is_required)
    bit = (tl.full([TILE_BLOCKS], 1, tl.int32) << column)[None, :]
    seen = tl.sum(tl.where(is_candidate & is_certain, bit, 0), 1)
    unsure = tl.sum(tl.where(is_candidate & is_partial, bit, 0), 1)
    place = words + ((first_row + query_block) * num_key_tiles + key_tile) * 2
    tl.store(place, seen, mask=is_row)
    tl.store(place + 1, unsure, mask=is_row)
