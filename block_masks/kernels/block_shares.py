"""Triton kernels of ``block_shares.compute_block_shares`` for causal attention of a prompt to itself.

    score_pieces    rows x columns -> the log of each row's mass on each piece of a key block, and on each chunk
    pool_pieces     those -> shares: normalised, summed by key block, averaged over the rows of a query block

Scores are never written. A row or a column stands for TOKENS neighbouring tokens, and may be PARTS vectors long: then
their products are added. The rows of all query heads that share a KV head stand in one tile, so that they share the
loads of its columns. A piece is a key block, or a part of one that is larger than a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
    position, number = _place_rows(first_block, row, length, GROUP, BLOCK, ROW_TOKENS, IS_MIDDLE)
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
        largest, total = _add_mass(largest, total, log_mass)
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
        largest, total = _add_mass(largest, total, log_mass)
    entry = (batch_kv * num_chunks + chunk) * num_rows + row
    tl.store(chunk_masses + entry, largest + tl.log2(total), mask=row < num_rows)


@triton.jit
def _place_rows(
    first_block: int,
    row: tl.tensor,
    length: int,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_TOKENS: tl.constexpr,
    IS_MIDDLE: tl.constexpr,
) -> tl.tensor:
    """Return the query up to which rows see, the middle or the last of their tokens, and how many tokens there are."""
    block_rows: tl.constexpr = BLOCK // ROW_TOKENS
    start = (first_block + row // (GROUP * block_rows)) * BLOCK + row % block_rows * ROW_TOKENS
    number = tl.maximum(tl.minimum(length - start, ROW_TOKENS), 0)
    position = start + number // 2
    if not IS_MIDDLE:
        position = start + number - 1
    return tl.minimum(position, length - 1), number


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


@triton.jit
def _add_mass(largest: tl.tensor, total: tl.tensor, log_mass: tl.tensor) -> tl.tensor:
    """Add pieces to a running sum of masses, kept as the largest log and the sum over its power of 2."""
    new_largest = tl.maximum(largest, tl.max(log_mass, 1))
    total = total * tl.exp2(largest - new_largest) + tl.sum(tl.exp2(log_mass - new_largest[:, None]), 1)
    return new_largest, total


@triton.jit
def pool_pieces(
    masses: tl.tensor,
    chunk_masses: tl.tensor,
    shares: tl.tensor,
    length: int,
    first_block: int,
    num_rows: int,
    num_pieces: int,
    num_chunks: int,
    chunk_columns: int,
    num_blocks: int,
    heads: int,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_TOKENS: tl.constexpr,
    COLUMN_TOKENS: tl.constexpr,
    IS_MIDDLE: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Normalise and average the rows of a query block. Grid: (tiles of key blocks, query blocks, B * H).

    ``shares`` is (B, H, num_blocks, num_blocks) float32, zero beyond the diagonal.
    """
    block_rows: tl.constexpr = BLOCK // ROW_TOKENS
    block_columns: tl.constexpr = BLOCK // COLUMN_TOKENS
    program = tl.program_id(2).to(tl.int64)
    local = tl.program_id(1)
    query_block = first_block + local
    key_block = tl.program_id(0) * TILE + tl.arange(0, TILE)
    shares += (program * num_blocks + query_block) * num_blocks
    if tl.program_id(0) * TILE > query_block:
        tl.store(shares + key_block, tl.zeros([TILE], tl.float32), mask=key_block < num_blocks)
        return

    batch_kv = program // GROUP  # the heads of a group follow each other, B * H as B * Hkv * GROUP
    row = (local * GROUP + (program % GROUP).to(tl.int32)) * block_rows + tl.arange(0, block_rows)
    _, number = _place_rows(first_block, row, length, GROUP, BLOCK, ROW_TOKENS, IS_MIDDLE)
    weight = number.to(tl.float32) / tl.maximum(tl.sum(number, 0), 1).to(tl.float32)
    largest = tl.full([block_rows], -1e38, tl.float32)
    total = tl.zeros([block_rows], tl.float32)
    for chunk in range(tl.minimum(num_chunks, ((query_block + 1) * block_columns - 1) // chunk_columns + 1)):
        log_mass = tl.load(chunk_masses + (batch_kv * num_chunks + chunk) * num_rows + row)
        largest, total = _add_mass(largest, total, log_mass[:, None])
    log_total = largest + tl.log2(total)

    mass = tl.zeros([block_rows, TILE], tl.float32)
    is_seen = (key_block <= query_block)[None, :]
    for part in tl.static_range(BLOCK_PIECES):
        piece = batch_kv * num_pieces + key_block * BLOCK_PIECES + part
        log_mass = tl.load(masses + piece[None, :] * num_rows + row[:, None], mask=is_seen, other=float("-inf"))
        mass += tl.exp2(log_mass - log_total[:, None])
    share = tl.sum(mass * weight[:, None], 0)
    # A row that is not finite is nothing to blocks that it doesn't see.
    tl.store(shares + key_block, tl.where(key_block <= query_block, share, 0.0), mask=key_block < num_blocks)
