"""The Triton kernel that turns masses of pieces into shares, and its launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launcher, cdiv
from .pieces import add_mass, place_rows
from .plan import SharePlan, Turn


def launch_pool_pieces(
    launcher: Launcher, plan: SharePlan, turn: Turn, masses: Tensor, chunk_masses: Tensor, shares: Tensor
) -> None:
    """Normalise the masses, sum them by key block and average them over the rows of each of the turn's query blocks."""
    block_size = plan.inputs.block_size
    tile = min(128, max(16, 2048 * plan.rows.tokens // block_size))
    launcher.run(
        pool_pieces,
        (cdiv(plan.num_blocks, tile), turn.last - turn.first, plan.batch * plan.heads),
        {
            "masses": masses,
            "chunk_masses": chunk_masses,
            "shares": shares,
            "length": plan.inputs.query.shape[2],
            "first_block": turn.first,
            "num_rows": turn.num_rows,
            "num_pieces": turn.num_pieces,
            "num_chunks": turn.num_chunks,
            "chunk_columns": turn.chunk_tiles * plan.tiles.columns,
            "num_blocks": plan.num_blocks,
            "heads": plan.heads,
            **plan.constants,
            "BLOCK_PIECES": plan.block_pieces,
            "TILE": tile,
        },
        num_warps=4,
        variant=turn.first,
    )


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
    _, number = place_rows(first_block, row, length, GROUP, BLOCK, ROW_TOKENS, IS_MIDDLE)
    weight = number.to(tl.float32) / tl.maximum(tl.sum(number, 0), 1).to(tl.float32)
    largest = tl.full([block_rows], -1e38, tl.float32)
    total = tl.zeros([block_rows], tl.float32)
    for chunk in range(tl.minimum(num_chunks, ((query_block + 1) * block_columns - 1) // chunk_columns + 1)):
        log_mass = tl.load(chunk_masses + (batch_kv * num_chunks + chunk) * num_rows + row)
        largest, total = add_mass(largest, total, log_mass[:, None])
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
