"""The Triton kernel that reads keys and values: means of keys, and which blocks are not finite.

It is bound by memory: each key and value is read once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pool_keys(
    key: tl.tensor,
    value: tl.tensor,
    means: tl.tensor,
    length: int,
    num_blocks: int,
    kv_heads: int,
    batch_kv_heads: int,
    pitch: int,
    key_batch: tl.tensor,
    key_head: tl.tensor,
    key_token: tl.tensor,
    key_feature: tl.tensor,
    value_batch: tl.tensor,
    value_head: tl.tensor,
    value_token: tl.tensor,
    value_feature: tl.tensor,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    POOL: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """Average each POOL keys of a block, or look through a block of values.

    Grid: (num_blocks, B * Hkv, 1 or, with values, 2). ``means`` is (B * Hkv, pitch, D) in the dtype of the keys, zero
    beyond the prompt. Behind them it takes (2, B * Hkv, num_blocks) faults, of keys and of values: 0, or 1 for a block
    that holds NaN or inf.
    """
    block = tl.program_id(0)
    batch_kv = tl.program_id(1).to(tl.int64)
    batch, kv_head = batch_kv // kv_heads, batch_kv % kv_heads
    fault = tl.full([], 0, tl.int32)
    if tl.program_id(2) == 0:
        key += batch * key_batch + kv_head * key_head
        feature = tl.arange(0, WIDTH)
        for part in tl.static_range(BLOCK // TOKENS):
            first = block * BLOCK + part * TOKENS
            keys = load_tokens(key, first, length, key_token, key_feature, HEAD_DIM, WIDTH, TOKENS)
            total = tl.sum(tl.reshape(keys.to(tl.float32), [TOKENS // POOL, POOL, WIDTH]), 1)
            pool = first + tl.arange(0, TOKENS // POOL) * POOL
            number = tl.maximum(tl.minimum(length - pool, POOL), 1)
            mean = total / number.to(tl.float32)[:, None]
            place = (batch_kv * pitch + pool // POOL)[:, None] * HEAD_DIM + feature[None, :]
            tl.store(means + place, mean.to(means.dtype.element_ty), mask=(feature < HEAD_DIM)[None, :])
            fault = tl.maximum(fault, find_fault(mean))
    else:
        value += batch * value_batch + kv_head * value_head
        for part in tl.static_range(BLOCK // TOKENS):
            first = block * BLOCK + part * TOKENS
            values = load_tokens(value, first, length, value_token, value_feature, VALUE_DIM, VALUE_WIDTH, TOKENS)
            fault = tl.maximum(fault, find_fault(values.to(tl.float32)))
    faults = means + tl.cast(batch_kv_heads, tl.int64) * pitch * HEAD_DIM
    entry = (tl.program_id(2) * batch_kv_heads + batch_kv) * num_blocks + block
    tl.store(faults + entry, fault.to(means.dtype.element_ty))


@triton.jit
def load_tokens(
    start: tl.tensor,
    first: int,
    length: int,
    token_stride: tl.tensor,
    feature_stride: tl.tensor,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
) -> tl.tensor:
    """Return (TOKENS, WIDTH), zero beyond the prompt and the features."""
    feature = tl.arange(0, WIDTH)
    token = tl.arange(0, TOKENS)
    start += tl.cast(first, tl.int64) * token_stride
    inside = (first + token < length)[:, None] & (feature < HEAD_DIM)[None, :]
    return tl.load(start + (token[:, None] * token_stride + feature[None, :] * feature_stride), mask=inside, other=0)


@triton.jit
def find_fault(x: tl.tensor) -> tl.tensor:
    """Return 1 if a number is NaN or infinite, else 0."""
    return tl.max(tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), 1), 0)
