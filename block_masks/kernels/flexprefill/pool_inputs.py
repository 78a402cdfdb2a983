"""The Triton kernel that pools queries and keys and finds blocks that are not finite, and its launch.

It is bound by memory: it reads every input once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..launch import next_power_of_2
from .buffers import SelectionBuffers

_VALUE_STRIDES = ("value_batch", "value_head", "value_token", "value_feature")


def launch_pool_inputs(buffers: SelectionBuffers) -> None:
    """Pool queries and keys, and find the blocks that are not finite."""
    value = buffers.query if buffers.value is None else buffers.value  # not read if there is none
    value_width = next_power_of_2(value.shape[-1])
    kinds = buffers.heads + buffers.kv_heads * (1 if buffers.value is None else 2)
    buffers.run(
        pool_inputs,
        (buffers.num_blocks + 1, buffers.batch * kinds),
        {
            "query": buffers.query,
            "key": buffers.key,
            "value": value,
            "pooled_query": buffers.pooled_query,
            "pooled_key": buffers.pooled_key,
            "query_peak": buffers.query_peak,
            "key_peak": buffers.key_peak,
            "value_peak": buffers.value_peak,
            "length": buffers.length,
            "num_blocks": buffers.num_blocks,
            "batch": buffers.batch,
            "heads": buffers.heads,
            "kv_heads": buffers.kv_heads,
            **buffers.query_strides,
            **buffers.key_strides,
            **dict(zip(_VALUE_STRIDES, value.stride(), strict=True)),
            "HEAD_DIM": buffers.head_dim,
            "VALUE_DIM": value.shape[-1],
            "WIDTH": buffers.width,
            "VALUE_WIDTH": value_width,
            "BLOCK": buffers.block_size,
            "TOKENS": min(buffers.block_size, 16384 // max(buffers.width, value_width)),
        },
        num_warps=4,
    )


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
