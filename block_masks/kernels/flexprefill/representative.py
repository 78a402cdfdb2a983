"""Triton kernels that read the inputs: pooling, and the attention of the last queries.

    pool_inputs              query, key, value -> pooled query and key; which blocks are not finite
    score_representative     last queries x keys -> each row's mass on each key block, and where in it
    pool_masses              those -> mass by key block and by side of the diagonal, averaged over the rows

The first is bound by memory: it reads every input once. The second is bound by the matrix units and reads the keys
once more, from the L2 cache where they fit. Scores are never written: a key block leaves three or four numbers behind
for each row.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
    """Average a block of queries or keys, or look through a block of values.

    Grid: (num_blocks + 1, B * (H + 2 * Hkv)). The block after the last is that of the representative queries.
    ``pooled_query`` is (B, H, num_blocks + 1, D).
    """
    block = tl.program_id(0)
    program = tl.program_id(1)
    if program < batch * heads:
        start = query + (program // heads).to(tl.int64) * query_batch + (program % heads).to(tl.int64) * query_head
        entry = program.to(tl.int64) * (num_blocks + 1) + block
        first = tl.where(block < num_blocks, block * BLOCK, tl.maximum(length - BLOCK, 0))
        _pool_block(
            start, pooled_query + entry * HEAD_DIM, query_peak + entry, first, length, query_token, query_feature,
            HEAD_DIM, WIDTH, BLOCK, TOKENS,
        )  # fmt: skip
        return
    if block == num_blocks:
        return
    if program < batch * (heads + kv_heads):
        program -= batch * heads
        start = key + (program // kv_heads).to(tl.int64) * key_batch + (program % kv_heads).to(tl.int64) * key_head
        entry = program.to(tl.int64) * num_blocks + block
        _pool_block(
            start, pooled_key + entry * HEAD_DIM, key_peak + entry, block * BLOCK, length, key_token, key_feature,
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
    first: int,
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
        tokens = _load_tokens(
            start, first + part * TOKENS, length, token_stride, feature_stride, HEAD_DIM, WIDTH, TOKENS
        )
        total += tl.sum(tokens, 0)
    mean = total / tl.minimum(length - first, BLOCK)
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
    chunk_masses: tl.tensor,
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
    counted from the block diagonal on which the first representative query meets the start of the key block.
    ``chunk_masses``, (B, Hkv, chunks, group rows), is the log2 of the mass of a chunk.
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
    chunk_largest = tl.full([ROWS], -1e38, tl.float32)
    chunk_total = tl.zeros([ROWS], tl.float32)

    # Blocks before ``sure`` lie in the past of every row.
    stop = tl.minimum((chunk + 1) * chunk_blocks, num_blocks)
    sure = tl.minimum(tl.maximum((first + 1) // BLOCK, chunk * chunk_blocks), stop)
    for block in range(chunk * chunk_blocks, sure):
        log_mass, after, before, beyond = _score_block(
            queries, key, block, length, position, row_offset, scale_log2e, key_token, key_feature,
            HEAD_DIM, WIDTH, BLOCK, ROWS, KEYS, IS_RAGGED, False, PRECISION,
        )  # fmt: skip
        entry = (batch_kv * num_blocks + block) * group_rows + row
        _store_masses(masses + entry, plane, log_mass, after, before, beyond, is_row, IS_RAGGED)
        chunk_largest, chunk_total = _add_mass(chunk_largest, chunk_total, log_mass)
    for block in range(sure, stop):
        log_mass, after, before, beyond = _score_block(
            queries, key, block, length, position, row_offset, scale_log2e, key_token, key_feature,
            HEAD_DIM, WIDTH, BLOCK, ROWS, KEYS, IS_RAGGED, True, PRECISION,
        )  # fmt: skip
        entry = (batch_kv * num_blocks + block) * group_rows + row
        _store_masses(masses + entry, plane, log_mass, after, before, beyond, is_row, IS_RAGGED)
        chunk_largest, chunk_total = _add_mass(chunk_largest, chunk_total, log_mass)

    entry = (batch_kv * tl.num_programs(1) + chunk) * group_rows + row
    tl.store(chunk_masses + entry, chunk_largest + tl.log2(chunk_total), mask=is_row)


@triton.jit
def _score_block(
    queries: tl.tensor,
    key: tl.tensor,
    block: int,
    length: int,
    position: tl.tensor,
    row_offset: tl.tensor,
    scale_log2e: float,
    key_token: tl.tensor,
    key_feature: tl.tensor,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    IS_RAGGED: tl.constexpr,
    IS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Return the log2 of each row's mass on a key block, and the three means over it, each (ROWS,).

    Only with IS_LAST may some row not see some key.
    """
    token = tl.arange(0, KEYS)
    feature = tl.arange(0, WIDTH)
    is_feature = feature < HEAD_DIM
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    moment = tl.zeros([ROWS], tl.float32)
    after = tl.zeros([ROWS], tl.float32)
    beyond = tl.zeros([ROWS], tl.float32)
    for part in tl.static_range(BLOCK // KEYS):
        start = block * BLOCK + part * KEYS
        inside = is_feature[None, :]
        if IS_LAST:
            inside = (start + token < length)[:, None] & inside
        keys = tl.load(
            key + start.to(tl.int64) * key_token + token[:, None] * key_token + feature[None, :] * key_feature,
            mask=inside,
            other=0,
        )
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale_log2e
        if IS_LAST:
            scores = tl.where((start + token)[None, :] <= position[:, None], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        decay = tl.exp2(largest - reference)
        mass = tl.exp2(scores - reference[:, None])
        place = ((part * KEYS + token).to(tl.float32) / BLOCK)[None, :]
        offset = row_offset[:, None] - place
        total = total * decay + tl.sum(mass, 1)
        moment = moment * decay + tl.sum(mass * place, 1)
        after = after * decay + tl.sum(mass * tl.maximum(offset, 0.0), 1)
        if IS_RAGGED:
            beyond = beyond * decay + tl.sum(mass * tl.maximum(offset - 1.0, 0.0), 1)
        largest = new_largest
    share = tl.where(total > 0, 1.0 / total, 0.0)
    # max(u, 0) - max(-u, 0) is u: its mean is that of the row's place less that of the keys.
    before = tl.maximum((after + moment) * share - tl.where(total > 0, row_offset, 0.0), 0.0)
    log_mass = tl.where(largest == float("-inf"), 0.0, largest) + tl.log2(total)
    return log_mass, after * share, before, beyond * share


@triton.jit
def _store_masses(
    masses: tl.tensor,
    plane: int,
    log_mass: tl.tensor,
    after: tl.tensor,
    before: tl.tensor,
    beyond: tl.tensor,
    is_row: tl.tensor,
    IS_RAGGED: tl.constexpr,
) -> None:
    tl.store(masses, log_mass, mask=is_row)
    tl.store(masses + plane, after, mask=is_row)
    tl.store(masses + 2 * plane, before, mask=is_row)
    if IS_RAGGED:
        tl.store(masses + 3 * plane, beyond, mask=is_row)


@triton.jit
def _add_mass(largest: tl.tensor, total: tl.tensor, log_mass: tl.tensor) -> tl.tensor:
    new_largest = tl.maximum(largest, log_mass)
    return new_largest, total * tl.exp2(largest - new_largest) + tl.exp2(log_mass - new_largest)


@triton.jit
def pool_masses(
    masses: tl.tensor,
    chunk_masses: tl.tensor,
    pooled_query: tl.tensor,
    pooled_key: tl.tensor,
    pooled: tl.tensor,
    scale: float,
    num_blocks: int,
    num_rows: int,
    num_chunks: int,
    plane: int,
    heads: int,
    kv_heads: int,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    IS_RAGGED: tl.constexpr,
) -> None:
    """Normalise a head's masses and average them over its rows; estimate the same from pooled queries and keys.

    Grid: (tiles of key blocks, B * H). ``pooled`` is (B, H, 5, num_blocks): the mass of a key block, the three parts
    of it that cross to other diagonals, and the logit of the estimate.
    """
    program = tl.program_id(1).to(tl.int64)
    group = heads // kv_heads
    batch_kv = program // heads * kv_heads + program % heads // group
    row = tl.arange(0, BLOCK)
    is_row = row < num_rows
    group_rows = group * num_rows
    first_row = program % heads % group * num_rows

    largest = tl.full([BLOCK], -1e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for chunk in range(num_chunks):
        place = (batch_kv * num_chunks + chunk) * group_rows + first_row + row
        log_mass = tl.load(chunk_masses + place, mask=is_row, other=0.0)
        new_largest = tl.maximum(largest, log_mass)
        total = total * tl.exp2(largest - new_largest) + tl.exp2(log_mass - new_largest)
        largest = new_largest
    log_total = largest + tl.log2(total)

    block = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_block = block < num_blocks
    place = (batch_kv * num_blocks + block)[:, None] * group_rows + first_row + row[None, :]
    inside = is_block[:, None] & is_row[None, :]
    log_mass = tl.load(masses + place, mask=inside, other=float("-inf"))
    mass = tl.exp2(log_mass - log_total[None, :]) / num_rows
    pooled += program * 5 * num_blocks + block
    tl.store(pooled, tl.sum(mass, 1), mask=is_block)
    for side in tl.static_range(1, 4 if IS_RAGGED else 3):
        share = tl.load(masses + side * plane + place, mask=inside, other=0.0)
        tl.store(pooled + side * num_blocks, tl.sum(mass * share, 1), mask=is_block)

    feature = tl.arange(0, WIDTH)
    is_feature = feature < HEAD_DIM
    mean_query = tl.load(
        pooled_query + ((program + 1) * (num_blocks + 1) - 1) * HEAD_DIM + feature, mask=is_feature, other=0.0
    )
    keys = tl.load(
        pooled_key + (batch_kv * num_blocks + block)[:, None] * HEAD_DIM + feature[None, :],
        mask=is_block[:, None] & is_feature[None, :],
        other=0.0,
    )
    tl.store(pooled + 4 * num_blocks, tl.sum(keys * mean_query[None, :], 1) * scale, mask=is_block)
