"""Triton kernels that read the inputs: pooling, the attention of the last queries, and each head's pattern.

    pool_inputs              query, key, value -> pooled query and key; which blocks are not finite
    score_representative     last queries x keys -> each row's mass on each key block, and where in it
    finish_representative    those -> columns, diagonals, pattern of each head

The first is bound by memory: it reads every input once. The second is bound by the matrix units and reads the keys once
more, from the L2 cache where they fit. Scores are never written: a key block leaves three or four numbers behind for each
row.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Patterns of a head, as finish_representative writes them.
EVERY_BLOCK = tl.constexpr(0)
VERTICAL_SLASH = tl.constexpr(1)
QUERY_AWARE = tl.constexpr(2)


@triton.jit
def pool_inputs(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    pooled_query: tl.tensor,
    pooled_key: tl.tensor,
    query_peak: tl.tensor,
    key_peak: tl.tensor,
    value_peak: tl.tensor,
    length: int,
    num_blocks: int,
    batch: int,
    heads: int,
    kv_heads: int,
    query_batch: tl.tensor,
    query_head: tl.tensor,
    query_token: tl.tensor,
    query_feature: tl.tensor,
    key_batch: tl.tensor,
    key_head: tl.tensor,
    key_token: tl.tensor,
    key_feature: tl.tensor,
    value_batch: tl.tensor,
    value_head: tl.tensor,
    value_token: tl.tensor,
    value_feature: tl.tensor,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """Average a block of queries or keys, or look through a block of values. Grid: (num_blocks, B * (H + 2 * Hkv))."""
    block = tl.program_id(0)
    program = tl.program_id(1)
    if program < batch * heads:
        start = query + (program // heads).to(tl.int64) * query_batch + (program % heads).to(tl.int64) * query_head
        entry = program.to(tl.int64) * num_blocks + block
        _pool_block(
            start, pooled_query + entry * HEAD_DIM, query_peak + entry, block, length, query_token, query_feature,
            HEAD_DIM, WIDTH, BLOCK, TOKENS,
        )  # fmt: skip
    elif program < batch * (heads + kv_heads):
        program -= batch * heads
        start = key + (program // kv_heads).to(tl.int64) * key_batch + (program % kv_heads).to(tl.int64) * key_head
        entry = program.to(tl.int64) * num_blocks + block
        _pool_block(
            start, pooled_key + entry * HEAD_DIM, key_peak + entry, block, length, key_token, key_feature,
            HEAD_DIM, WIDTH, BLOCK, TOKENS,
        )  # fmt: skip
    else:
        program -= batch * (heads + kv_heads)
        start = value + (program // kv_heads).to(tl.int64) * value_batch
        start += (program % kv_heads).to(tl.int64) * value_head
        largest = tl.zeros([VALUE_WIDTH], tl.float32)
        for part in tl.static_range(BLOCK // TOKENS):
            x = _load_tokens(
                start, block * BLOCK + part * TOKENS, length, value_token, value_feature, VALUE_DIM, VALUE_WIDTH, TOKENS
            )
            largest = tl.maximum(largest, tl.max(tl.where(tl.abs(x) < float("inf"), 0.0, float("inf")), 0))
        tl.store(value_peak + program * num_blocks + block, tl.max(largest, 0))


@triton.jit
def _pool_block(
    start: tl.tensor,
    pooled: tl.tensor,
    peak: tl.tensor,
    block: int,
    length: int,
    token_stride: tl.tensor,
    feature_stride: tl.tensor,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """Write the mean of a block's tokens, and its largest magnitude, infinite if a token is not finite."""
    feature = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for part in tl.static_range(BLOCK // TOKENS):
        first = block * BLOCK + part * TOKENS
        total += tl.sum(_load_tokens(start, first, length, token_stride, feature_stride, HEAD_DIM, WIDTH, TOKENS), 0)
    mean = total / tl.minimum(length - block * BLOCK, BLOCK)
    tl.store(pooled + feature, mean, mask=feature < HEAD_DIM)
    tl.store(peak, tl.max(tl.where(tl.abs(mean) < float("inf"), tl.abs(mean), float("inf")), 0))


@triton.jit
def _load_tokens(
    start: tl.tensor,
    first: int,
    length: int,
    token_stride: tl.tensor,
    feature_stride: tl.tensor,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
) -> tl.tensor:
    """Return (TOKENS, WIDTH) float32, zero beyond the prompt and the features."""
    feature = tl.arange(0, WIDTH)
    token = tl.arange(0, TOKENS)
    start += tl.cast(first, tl.int64) * token_stride
    inside = (first + token < length)[:, None] & (feature < HEAD_DIM)[None, :]
    place = token[:, None] * token_stride + feature[None, :] * feature_stride
    return tl.load(start + place, mask=inside, other=0).to(tl.float32)


@triton.jit
def score_representative(
    query: tl.tensor,
    key: tl.tensor,
    masses: tl.tensor,
    scale_log2e: float,
    length: int,
    num_blocks: int,
    num_rows: int,
    group_rows: int,
    plane: int,
    chunk_blocks: int,
    kv_heads: int,
    query_batch: tl.tensor,
    query_head: tl.tensor,
    query_token: tl.tensor,
    query_feature: tl.tensor,
    key_batch: tl.tensor,
    key_head: tl.tensor,
    key_token: tl.tensor,
    key_feature: tl.tensor,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    IS_RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Score the last queries of a KV head's group against a chunk of its keys, once.

    Grid: (row tiles, chunks, B * Hkv); neighbours share their keys through the L2 cache. ``masses`` are planes of
    (B, Hkv, num_blocks, group rows) float32: the log2 of the mass of a key block, and the mean over that mass of
    max(u, 0), max(-u, 0) and, if the prompt's end is ragged, max(u - 1, 0), where u is the offset of a pair in blocks,
    counted from the block diagonal on which the first representative query meets the start of the key block. From
    these ``finish_representative`` has the shares on every block diagonal.
    """
    row_tile = tl.program_id(0)
    chunk = tl.program_id(1)
    batch_kv = tl.program_id(2).to(tl.int64)
    batch = batch_kv // kv_heads
    kv_head = batch_kv % kv_heads

    feature = tl.arange(0, WIDTH)
    is_feature = feature < HEAD_DIM
    row = row_tile * ROWS + tl.arange(0, ROWS)
    is_row = row < group_rows
    head = kv_head * (group_rows // num_rows) + row // num_rows
    first = length - num_rows
    position = first + row % num_rows
    place = head * query_head + position.to(tl.int64) * query_token
    queries = tl.load(
        query + batch * query_batch + place[:, None] + feature[None, :] * query_feature,
        mask=is_row[:, None] & is_feature[None, :],
        other=0,
    )
    row_offset = (first % BLOCK + row % num_rows).to(tl.float32) / BLOCK
    key += batch * key_batch + kv_head * key_head
    token = tl.arange(0, KEYS)

    for block in range(chunk * chunk_blocks, tl.minimum((chunk + 1) * chunk_blocks, num_blocks)):
        largest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        after = tl.zeros([ROWS], tl.float32)
        before = tl.zeros([ROWS], tl.float32)
        beyond = tl.zeros([ROWS], tl.float32)
        for part in tl.static_range(BLOCK // KEYS):
            start = block * BLOCK + part * KEYS
            keys = tl.load(
                key + start.to(tl.int64) * key_token + token[:, None] * key_token + feature[None, :] * key_feature,
                mask=(start + token < length)[:, None] & is_feature[None, :],
                other=0,
            )
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale_log2e
            scores = tl.where((start + token)[None, :] <= position[:, None], scores, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(scores, 1))
            reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            decay = tl.exp2(largest - reference)
            mass = tl.exp2(scores - reference[:, None])
            offset = row_offset[:, None] - ((part * KEYS + token).to(tl.float32) / BLOCK)[None, :]
            total = total * decay + tl.sum(mass, 1)
            after = after * decay + tl.sum(mass * tl.maximum(offset, 0.0), 1)
            before = before * decay + tl.sum(mass * tl.maximum(-offset, 0.0), 1)
            if IS_RAGGED:
                beyond = beyond * decay + tl.sum(mass * tl.maximum(offset - 1.0, 0.0), 1)
            largest = new_largest

        reference = tl.where(largest == float("-inf"), 0.0, largest)
        share = tl.where(total > 0, 1.0 / total, 0.0)
        entry = (batch_kv * num_blocks + block) * group_rows + row
        tl.store(masses + entry, reference + tl.log2(total), mask=is_row)
        tl.store(masses + plane + entry, after * share, mask=is_row)
        tl.store(masses + 2 * plane + entry, before * share, mask=is_row)
        if IS_RAGGED:
            tl.store(masses + 3 * plane + entry, beyond * share, mask=is_row)


@triton.jit
def finish_representative(
    query: tl.tensor,
    pooled_key: tl.tensor,
    query_peak: tl.tensor,
    key_peak: tl.tensor,
    value_peak: tl.tensor,
    masses: tl.tensor,
    scratch: tl.tensor,
    profiles: tl.tensor,
    patterns: tl.tensor,
    scale: float,
    tau: float,
    length: int,
    num_blocks: int,
    num_rows: int,
    plane: int,
    heads: int,
    kv_heads: int,
    query_batch: tl.tensor,
    query_head: tl.tensor,
    query_token: tl.tensor,
    query_feature: tl.tensor,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    IS_RAGGED: tl.constexpr,
    HAS_VALUE: tl.constexpr,
) -> None:
    """Normalise one head's masses, pool them, and choose its pattern. Grid: (B * H,).

    ``profiles`` is (B, H, 2, num_blocks): columns and diagonals. ``scratch`` is (B, H, 4, num_blocks).
    """
    program = tl.program_id(0).to(tl.int64)
    group = heads // kv_heads
    head = program % heads
    batch_kv = program // heads * kv_heads + head // group
    row = tl.arange(0, BLOCK)
    is_row = row < num_rows
    masses += batch_kv * num_blocks * (group * num_rows) + head % group * num_rows

    # A row's normaliser. Masked rows count 1 and are dropped below.
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_blocks, TILE):
        block = start + tl.arange(0, TILE)
        entry = block[:, None] * (group * num_rows) + row[None, :]
        inside = (block < num_blocks)[:, None] & is_row[None, :]
        log_mass = tl.load(masses + entry, mask=inside, other=float("-inf"))
        new_largest = tl.maximum(tl.maximum(largest, tl.max(log_mass, 0)), -1e38)
        total = total * tl.exp2(largest - new_largest) + tl.sum(tl.exp2(log_mass - new_largest[None, :]), 0)
        largest = new_largest
    log_total = largest + tl.log2(total)

    scratch += program * 4 * num_blocks
    mean_query = _mean_of_last(
        query + program // heads * query_batch + head * query_head,
        length,
        num_rows,
        query_token,
        query_feature,
        HEAD_DIM,
        WIDTH,
        BLOCK,
    )
    feature = tl.arange(0, WIDTH)
    for start in range(0, num_blocks, TILE):
        block = start + tl.arange(0, TILE)
        is_block = block < num_blocks
        entry = block[:, None] * (group * num_rows) + row[None, :]
        inside = is_block[:, None] & is_row[None, :]
        mass = tl.exp2(tl.load(masses + entry, mask=inside, other=float("-inf")) - log_total[None, :]) / num_rows
        mass = tl.where(inside, mass, 0.0)
        tl.store(scratch + block, tl.sum(mass, 1), mask=is_block)
        for side in tl.static_range(1, 4 if IS_RAGGED else 3):
            share = tl.load(masses + side * plane + entry, mask=inside, other=0.0)
            tl.store(scratch + side * num_blocks + block, tl.sum(mass * share, 1), mask=is_block)
        # The estimate's logits wait where the diagonals will stand.
        keys = tl.load(
            pooled_key + (batch_kv * num_blocks + block)[:, None] * HEAD_DIM + feature[None, :],
            mask=is_block[:, None] & (feature < HEAD_DIM)[None, :],
            other=0.0,
        )
        logits = tl.sum(keys * mean_query[None, :], 1) * scale
        tl.store(profiles + (program * 2 + 1) * num_blocks + block, logits, mask=is_block)
    tl.debug_barrier()

    block = tl.arange(0, NUM_BLOCKS)
    is_block = block < num_blocks
    columns = tl.load(scratch + block, mask=is_block, other=0.0)
    logits = tl.load(profiles + (program * 2 + 1) * num_blocks + block, mask=is_block, other=float("-inf"))
    estimate = tl.exp2((logits - tl.max(logits, 0)) * 1.4426950408889634)
    estimate = estimate / tl.sum(estimate, 0)
    divergence = _entropy((columns + estimate) / 2) - (_entropy(columns) + _entropy(estimate)) / 2
    is_query_aware = tl.sqrt(tl.maximum(divergence, 0.0)) < tau

    diagonals = tl.zeros([NUM_BLOCKS], tl.float32)
    first = (length - num_rows) // BLOCK
    for delta in tl.static_range(-1, 3 if IS_RAGGED else 2):
        source = first + delta - block
        diagonals += _share_on_diagonal(scratch, source, num_blocks, is_block, delta, IS_RAGGED)
        # What would cross beyond the last diagonal goes to the last.
        source = tl.where(block == num_blocks - 1, first + delta - num_blocks, -1)
        diagonals += _share_on_diagonal(scratch, source, num_blocks, is_block, delta, IS_RAGGED)

    # A bound on every pooled score: if it is finite, so is the whole pooled estimate.
    peak = tl.max(tl.load(query_peak + program * num_blocks + block, mask=is_block, other=0.0), 0)
    bound = peak * tl.max(tl.load(key_peak + batch_kv * num_blocks + block, mask=is_block, other=0.0), 0)
    bound = bound * tl.maximum(tl.abs(scale) * HEAD_DIM, 1.0) + tl.sum(columns, 0)
    if HAS_VALUE:
        bound += tl.max(tl.load(value_peak + batch_kv * num_blocks + block, mask=is_block, other=0.0), 0)
    tl.debug_barrier()
    pattern = tl.where(is_query_aware, QUERY_AWARE, VERTICAL_SLASH)
    tl.store(patterns + program, tl.where(bound < float("inf"), pattern, EVERY_BLOCK))
    tl.store(profiles + program * 2 * num_blocks + block, columns, mask=is_block)
    tl.store(profiles + (program * 2 + 1) * num_blocks + block, tl.maximum(diagonals, 0.0), mask=is_block)


@triton.jit
def _mean_of_last(
    start: tl.tensor,
    length: int,
    num_rows: int,
    token_stride: tl.tensor,
    feature_stride: tl.tensor,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    total = tl.zeros([WIDTH], tl.float32)
    for part in tl.static_range(BLOCK // 16):
        # Rows from num_rows on lie beyond the prompt, and count as zero.
        first = length - num_rows + part * 16
        total += tl.sum(_load_tokens(start, first, length, token_stride, feature_stride, HEAD_DIM, WIDTH, 16), 0)
    return total / num_rows


@triton.jit
def _entropy(p: tl.tensor) -> tl.tensor:
    return -tl.sum(tl.where(p > 0, p * tl.log(tl.where(p > 0, p, 1.0)), 0.0), 0)


@triton.jit
def _share_on_diagonal(
    scratch: tl.tensor, source: tl.tensor, num_blocks: int, is_block: tl.tensor, DELTA: tl.constexpr, IS_RAGGED: tl.constexpr
) -> tl.tensor:
    """Return what key blocks ``source`` put on the block diagonal DELTA away from their own.

    An offset u between DELTA - 1 and DELTA + 1 counts there for 1 - |u - DELTA|, written in the means kept of it.
    """
    inside = is_block & (source >= 0) & (source < num_blocks)
    after = tl.load(scratch + num_blocks + source, mask=inside, other=0.0)
    before = tl.load(scratch + 2 * num_blocks + source, mask=inside, other=0.0)
    beyond = tl.zeros_like(after)
    if IS_RAGGED:
        beyond = tl.load(scratch + 3 * num_blocks + source, mask=inside, other=0.0)
    if DELTA == -1:
        share = before
    elif DELTA == 0:
        share = tl.load(scratch + source, mask=inside, other=0.0) - before - after + beyond
    elif DELTA == 1:
        share = after - 2 * beyond
    else:
        share = beyond
    return share
