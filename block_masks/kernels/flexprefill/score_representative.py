"""The Triton kernel that scores the last queries against the keys, and its launch.

It is bound by the matrix units and reads the keys once more, from the L2 cache where they fit. Scores are never
written: a key block leaves three or four numbers behind for each row.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv, next_power_of_2
from .buffers import SelectionBuffers

# Enough programs to fill the largest GPU of today a few times over.
_SCORE_PROGRAMS = 512


def launch_score_representative(buffers: SelectionBuffers) -> tuple[Tensor, Tensor]:
    """Score the representative queries; return the masses by key block and by chunk of them."""
    query, kv_heads = buffers.query, buffers.batch * buffers.kv_heads
    group_rows = buffers.heads // buffers.kv_heads * buffers.num_rows
    rows, keys, num_warps, num_stages = _choose_tiles(
        group_rows, buffers.block_size, buffers.width, query.element_size()
    )
    row_tiles = cdiv(group_rows, rows)
    chunk_blocks = max(1, buffers.num_blocks * row_tiles * kv_heads // _SCORE_PROGRAMS)
    num_chunks = cdiv(buffers.num_blocks, chunk_blocks)
    num_planes = 4 if buffers.is_ragged else 3
    masses = query.new_empty((num_planes, kv_heads, buffers.num_blocks, group_rows), dtype=torch.float32)
    chunk_masses = query.new_empty((kv_heads, num_chunks, group_rows), dtype=torch.float32)
    buffers.run(
        score_representative,
        (row_tiles, num_chunks, kv_heads),
        {
            "query": query,
            "key": buffers.key,
            "masses": masses,
            "chunk_masses": chunk_masses,
            "scale_log2e": buffers.scale * math.log2(math.e),
            "length": buffers.length,
            "num_blocks": buffers.num_blocks,
            "num_rows": buffers.num_rows,
            "group_rows": group_rows,
            "plane": masses.stride(0),
            "chunk_blocks": chunk_blocks,
            "kv_heads": buffers.kv_heads,
            **buffers.query_strides,
            **buffers.key_strides,
            "HEAD_DIM": buffers.head_dim,
            "WIDTH": buffers.width,
            "BLOCK": buffers.block_size,
            "ROWS": rows,
            "KEYS": keys,
            "IS_RAGGED": buffers.is_ragged,
            "PRECISION": "tf32x3" if query.dtype == torch.float32 else "tf32",
        },
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return masses, chunk_masses


def _choose_tiles(group_rows: int, block_size: int, width: int, element_size: int) -> tuple[int, int, int, int]:
    """Return the rows and keys of a tile of scores, its warps and its pipeline stages."""
    rows = min(64, max(16, next_power_of_2(group_rows)))
    is_narrow = width * element_size <= 256
    largest = (128 if is_narrow else 64) if element_size == 2 else max(16, 4096 // width)
    # A stage holds a whole key block.
    num_stages = max(1, min(3, 2**17 * 3 // 4 // (block_size * width * element_size)))
    return rows, min(block_size, largest), 4 if is_narrow else 8, num_stages


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
