"""The Triton kernel that scores rows against columns, and its launch.

Scores are never written. A row or a column stands for TOKENS neighbouring tokens, and may be PARTS vectors long: then
their products are added. The rows of all query heads that share a KV head stand in one tile, so that they share the
loads of its columns. A piece is a key block, or a part of one that is larger than a tile.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launcher
from .pieces import add_mass, place_rows
from .plan import SharePlan, Turn


def launch_score_pieces(launcher: Launcher, plan: SharePlan, turn: Turn, masses: Tensor, chunk_masses: Tensor) -> None:
    """Score the rows of the turn's query blocks, into the logs of masses by piece and by chunk."""
    inputs, rows, columns, tiles = plan.inputs, plan.rows, plan.columns, plan.tiles
    row_batch, row_head, row_vector, row_part, row_feature = rows.strides
    column_batch, column_head, column_vector, column_part, column_feature = columns.strides
    launcher.run(
        score_pieces,
        (turn.row_tiles * turn.num_chunks, plan.batch * plan.kv_heads),
        {
            "rows": rows.start,
            "columns": columns.start,
            "masses": masses,
            "chunk_masses": chunk_masses,
            "scale_log2e": plan.scale * math.log2(math.e),
            "length": inputs.query.shape[2],
            "first_block": turn.first,
            "num_rows": turn.num_rows,
            "num_pieces": turn.num_pieces,
            "num_row_tiles": turn.row_tiles,
            "num_chunks": turn.num_chunks,
            "chunk_tiles": turn.chunk_tiles,
            "kv_heads": plan.kv_heads,
            "row_batch": row_batch,
            "row_head": row_head,
            "row_vector": row_vector,
            "row_part": row_part,
            "row_feature": row_feature,
            "column_batch": column_batch,
            "column_head": column_head,
            "column_vector": column_vector,
            "column_part": column_part,
            "column_feature": column_feature,
            **plan.constants,
            "PARTS": plan.parts,
            "HEAD_DIM": inputs.query.shape[-1],
            "WIDTH": plan.width,
            "FEATURES": tiles.features,
            "ROWS": tiles.rows,
            "COLUMNS": tiles.columns,
            "PIECE": plan.piece,
            "NEIGHBOURS": 64 if plan.parts == 1 else 8,
            "PRECISION": "tf32x3" if rows.data.dtype == torch.float32 else "tf32",
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        most_registers=tiles.most_registers,
        variant=turn.first,
    )


@triton.jit
def score_pieces(
    rows: tl.tensor,
    columns: tl.tensor,
    masses: tl.tensor,
    chunk_masses: tl.tensor,
    scale_log2e: float,
    length: int,
    first_block: int,
    num_rows: int,
    num_pieces: int,
    num_row_tiles: int,
    num_chunks: int,
    chunk_tiles: int,
    kv_heads: int,
    row_batch: tl.tensor,
    row_head: tl.tensor,
    row_vector: tl.tensor,
    row_part: tl.tensor,
    row_feature: tl.tensor,
    column_batch: tl.tensor,
    column_head: tl.tensor,
    column_vector: tl.tensor,
    column_part: tl.tensor,
    column_feature: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_TOKENS: tl.constexpr,
    COLUMN_TOKENS: tl.constexpr,
    IS_MIDDLE: tl.constexpr,
    PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECE: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Score a tile of rows of a KV head's group against a chunk of its columns, once.

    Grid: (row tiles * chunks, B * Hkv), NEIGHBOURS row tiles side by side, to share their columns through the L2 cache.
    ``rows`` is (B, H, vectors, PARTS, D), ``columns`` (B, Hkv, vectors, PARTS, D). The num_rows rows are those of some
    query blocks, from ``first_block`` on: (block, head of the group, row). ``masses`` is (B, Hkv, num_pieces, num_rows)
    and ``chunk_masses`` (B, Hkv, num_chunks, num_rows) float32, base 2 logs, of pieces and chunks up to the diagonal.
    """
    block_columns: tl.constexpr = BLOCK // COLUMN_TOKENS
    block_rows: tl.constexpr = GROUP * (BLOCK // ROW_TOKENS)
    tile_pieces: tl.constexpr = COLUMNS // PIECE

    program = tl.program_id(0)
    band = program // (NEIGHBOURS * num_chunks) * NEIGHBOURS
    band_tiles = tl.minimum(num_row_tiles - band, NEIGHBOURS)
    row_tile = band + program % (NEIGHBOURS * num_chunks) % band_tiles
    chunk = program % (NEIGHBOURS * num_chunks) // band_tiles
    batch_kv = tl.program_id(1).to(tl.int64)
    kv_head = batch_kv % kv_heads

    # Tiles of columns: before ``sure``, each row sees each column; from ``stop`` on, none does.
    first_row = row_tile * ROWS
    last_row = tl.minimum(first_row + ROWS, num_rows) - 1
    start = chunk * chunk_tiles
    stop = ((first_block + last_row // block_rows + 1) * block_columns + COLUMNS - 1) // COLUMNS
    stop = tl.minimum(start + chunk_tiles, stop)
    if start >= stop:
        return
    sure = tl.minimum(tl.maximum((first_block + first_row // block_rows) * block_columns // COLUMNS, start), stop)

    row = first_row + tl.arange(0, ROWS)
    position, number = place_rows(first_block, row, length, GROUP, BLOCK, ROW_TOKENS, IS_MIDDLE)
    is_row = (row < num_rows) & (number > 0)
    vector = position
    if not IS_MIDDLE:
        vector = (first_block + row // block_rows) * (BLOCK // ROW_TOKENS) + row % (BLOCK // ROW_TOKENS)
    head = kv_head * GROUP + row % block_rows // (BLOCK // ROW_TOKENS)
    rows += batch_kv // kv_heads * row_batch
    row_place = rows + (head * row_head + vector.to(tl.int64) * row_vector)
    columns += batch_kv // kv_heads * column_batch + kv_head * column_head

    feature = tl.arange(0, FEATURES)
    held = tl.zeros([1, 1], tl.float32)  # not used
    if PARTS == 1 and FEATURES == WIDTH:  # the rows stay where they are
        held = tl.load(
            row_place[:, None] + feature[None, :] * row_feature,
            mask=is_row[:, None] & (feature < HEAD_DIM)[None, :],
            other=0,
        )
    largest = tl.full([ROWS], -1e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    masses += batch_kv * num_pieces * num_rows
    for tile in range(start, sure):
        scores = _score_tile(
            held, row_place, is_row, columns, tile, length, row_part, row_feature, column_vector, column_part,
            column_feature, COLUMN_TOKENS, PARTS, HEAD_DIM, WIDTH, FEATURES, ROWS, COLUMNS, True, PRECISION,
        )  # fmt: skip
        log_mass = _pool_columns(scores * scale_log2e, ROWS, tile_pieces, PIECE)
        _store_pieces(masses, log_mass, tile * tile_pieces, row, num_pieces, num_rows, tile_pieces)
        largest, total = add_mass(largest, total, log_mass)
    for tile in range(sure, stop):
        scores = _score_tile(
            held, row_place, is_row, columns, tile, length, row_part, row_feature, column_vector, column_part,
            column_feature, COLUMN_TOKENS, PARTS, HEAD_DIM, WIDTH, FEATURES, ROWS, COLUMNS, False, PRECISION,
        )  # fmt: skip
        column_start = (tile * COLUMNS + tl.arange(0, COLUMNS)) * COLUMN_TOKENS
        scores = scores * scale_log2e
        if COLUMN_TOKENS > 1:  # a column that stands for fewer tokens than others weighs less
            tokens = tl.maximum(tl.minimum(length - column_start, COLUMN_TOKENS), 1)
            scores += tl.log2(tokens.to(tl.float32) / COLUMN_TOKENS)[None, :]
        scores = tl.where(column_start[None, :] <= position[:, None], scores, float("-inf"))
        log_mass = _pool_columns(scores, ROWS, tile_pieces, PIECE)
        _store_pieces(masses, log_mass, tile * tile_pieces, row, num_pieces, num_rows, tile_pieces)
        largest, total = add_mass(largest, total, log_mass)
    entry = (batch_kv * num_chunks + chunk) * num_rows + row
    tl.store(chunk_masses + entry, largest + tl.log2(total), mask=row < num_rows)


@triton.jit
def _score_tile(
    held: tl.tensor,
    row_place: tl.tensor,
    is_row: tl.tensor,
    columns: tl.tensor,
    tile: int,
    length: int,
    row_part: tl.tensor,
    row_feature: tl.tensor,
    column_vector: tl.tensor,
    column_part: tl.tensor,
    column_feature: tl.tensor,
    COLUMN_TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IS_SURE: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Return the products of rows and columns, (ROWS, COLUMNS) float32; columns beyond the prompt are zero."""
    feature = tl.arange(0, FEATURES)
    column = tl.arange(0, COLUMNS)
    columns += tl.cast(tile, tl.int64) * COLUMNS * column_vector
    column_place = columns + column[:, None] * column_vector
    is_column = (tile * COLUMNS + column) * COLUMN_TOKENS < length
    if PARTS == 1 and FEATURES == WIDTH:
        is_read = (feature < HEAD_DIM)[None, :]
        if not IS_SURE:
            is_read = is_read & is_column[:, None]
        b = tl.load(column_place + feature[None, :] * column_feature, mask=is_read, other=0)
        scores = tl.dot(held, tl.trans(b), input_precision=PRECISION)
    else:
        slices: tl.constexpr = WIDTH // FEATURES
        scores = tl.zeros([ROWS, COLUMNS], tl.float32)
        for step in range(PARTS * slices):
            part = step // slices
            now = step % slices * FEATURES + feature
            is_feature = (now < HEAD_DIM)[None, :]
            is_read = is_feature
            if not IS_SURE:
                is_read = is_feature & is_column[:, None]
            a = tl.load(
                row_place[:, None] + (part * row_part + now[None, :] * row_feature),
                mask=is_row[:, None] & is_feature,
                other=0,
            )
            b = tl.load(column_place + (part * column_part + now[None, :] * column_feature), mask=is_read, other=0)
            scores = tl.dot(a, tl.trans(b), scores, input_precision=PRECISION)
    return scores


@triton.jit
def _pool_columns(scores: tl.tensor, ROWS: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr) -> tl.tensor:
    """Return the base 2 log of the mass of each piece, (ROWS, PIECES), -inf where there is none."""
    scores = tl.reshape(scores, [ROWS, PIECES, PIECE])
    largest = tl.max(scores, 2)
    reference = tl.where(largest == float("-inf"), 0.0, largest)
    return reference + tl.log2(tl.sum(tl.exp2(scores - reference[:, :, None]), 2))


@triton.jit
def _store_pieces(
    masses: tl.tensor,
    log_mass: tl.tensor,
    first_piece: int,
    row: tl.tensor,
    num_pieces: int,
    num_rows: int,
    PIECES: tl.constexpr,
) -> None:
    piece = first_piece + tl.arange(0, PIECES)
    place = piece.to(tl.int64)[None, :] * num_rows + row[:, None]
    tl.store(masses + place, log_mass, mask=(row < num_rows)[:, None] & (piece < num_pieces)[None, :])
