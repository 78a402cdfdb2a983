"""The shares of ``EstimatorInputs`` and of antidiagonals on a GPU, by Triton kernels that write no scores.

    score_pieces -> pool_pieces, for as many query blocks at a time as ``MASSES_AT_ONCE_BYTES`` hold

For causal attention of a prompt to itself, without a softcap; launch shapes depend on the sizes alone.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
from torch import Tensor

from .block_shares import pool_pieces, score_pieces
from .launch import Launcher, cdiv, next_power_of_2

if TYPE_CHECKING:
    from ..estimators.inputs import EstimatorInputs

logger = logging.getLogger(__name__)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_HEAD_DIM = 256
MASSES_AT_ONCE_BYTES = 2**29  # of float32 masses, rows x key blocks: more rows take more launches
# Enough programs to fill the largest GPU of today a few times over.
SCORE_PROGRAMS = 1024


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Rows or columns.

    Attributes:
        data: (B, heads, vectors, parts, D), any strides.
        tokens: How many neighbouring tokens each stands for; of rows with ``is_middle``, ``data`` holds every token.
        is_middle: Whether a row is the middle one of its tokens, rather than made of them all.
        is_reversed: Whether the last part comes first.
    """

    data: Tensor
    tokens: int
    is_middle: bool = False
    is_reversed: bool = False

    @property
    def start(self) -> Tensor:
        """The part that comes first: (B, heads, vectors, D)."""
        return self.data[:, :, :, -1 if self.is_reversed else 0]

    @property
    def strides(self) -> tuple[int, ...]:
        """In elements, of batch, head, vector, part and feature."""
        *outer, part, feature = self.data.stride()
        return (*outer, -part if self.is_reversed else part, feature)


class Tiles(NamedTuple):
    """The sizes of a program of ``score_pieces``."""

    rows: int
    columns: int
    features: int
    num_warps: int
    num_stages: int
    most_registers: int | None = None


def can_share(inputs: EstimatorInputs) -> bool:
    """Tell whether the kernels take these inputs."""
    return (
        inputs.facts is None
        and inputs.softcap is None
        and inputs.query.dtype in DTYPES
        and inputs.query.shape[-1] <= LARGEST_HEAD_DIM
    )


def share_rows(inputs: EstimatorInputs, rows_per_block: int) -> Tensor | None:
    """Return what ``EstimatorInputs.share_of_rows`` does, or None where the GPU is too small for a tile."""
    tokens = inputs.block_size // rows_per_block
    rows = Vectors(inputs.query.unsqueeze(3), tokens, is_middle=True)
    return _try_tiles(inputs, rows, Vectors(inputs.key.unsqueeze(3), 1), inputs.scale)


def share_antidiagonals(inputs: EstimatorInputs, stride: int) -> Tensor | None:
    """Return what ``score_antidiagonals`` does, or None where the GPU is too small for a tile."""
    query, key = (_list_tiles(x, stride) for x in (inputs.query, inputs.key))
    return _try_tiles(inputs, Vectors(query, stride, is_reversed=True), Vectors(key, stride), inputs.scale / stride)


def _list_tiles(x: Tensor, stride: int) -> Tensor:
    """Return (B, H, tiles, stride, D), a view if the length allows; missing tokens are the mean of their tile's."""
    rest = x.shape[2] % stride
    if rest:
        mean = x[:, :, -rest:].mean(2, keepdim=True, dtype=torch.float32).to(x.dtype)
        x = torch.cat([x, mean.expand(-1, -1, stride - rest, -1)], dim=2)
    tiles: Tensor = x.unflatten(2, (-1, stride))
    return tiles


def choose_tiles(element_size: int, width: int, parts: int, num_rows: int, num_columns: int) -> Iterator[Tiles]:
    """Yield sizes of tiles, the fastest first, the ones that need the least shared memory last."""
    # Rows of one part are held while columns pass by. The powers of 2 keep the matrix units waiting: at 128 registers,
    # another program fills in. Rows of several parts pass by like the columns do; they have few powers.
    sizes = [Tiles(128, 128, width, 8, 2, 128), Tiles(64, 64, width, 4, 2), Tiles(32, 32, width, 4, 1)]
    if parts > 1 or width > 128:
        sizes = [Tiles(128, 256, 64, 8, 3), Tiles(128, 128, 64, 8, 2), Tiles(64, 64, 32, 4, 2), Tiles(32, 32, 32, 4, 1)]
    if element_size > 2:
        sizes = [Tiles(64, 64, 32, 4, 2), Tiles(32, 32, 32, 4, 1)]
    for tiles in sizes:
        yield tiles._replace(
            rows=min(tiles.rows, max(16, next_power_of_2(num_rows))),
            columns=min(tiles.columns, max(16, next_power_of_2(num_columns))),
            features=min(tiles.features, width),
        )


def _try_tiles(inputs: EstimatorInputs, rows: Vectors, columns: Vectors, scale: float) -> Tensor | None:
    launch = _Launch(inputs, rows, columns, scale)
    failure: Exception | None = None
    for tiles in launch.choose_tiles():
        try:
            with torch.cuda.device_of(inputs.query):
                return launch.share(tiles)
        except triton.OutOfResources as error:
            failure = error
    logger.warning("blocks are scored by plain PyTorch, slower: %s", failure)
    return None


class _Launch:
    """The sizes of one computation of shares."""

    def __init__(self, inputs: EstimatorInputs, rows: Vectors, columns: Vectors, scale: float) -> None:
        self.inputs, self.rows, self.columns, self.scale = inputs, rows, columns, scale
        self.batch, self.heads, self.num_blocks, _ = inputs.shape
        self.kv_heads = inputs.key.shape[1]
        self.group = self.heads // self.kv_heads
        self.block_rows = self.group * (inputs.block_size // rows.tokens)  # of all heads of a group
        self.block_columns = inputs.block_size // columns.tokens
        self.width = max(16, next_power_of_2(inputs.query.shape[-1]))
        self.constants = {
            "GROUP": self.group,
            "BLOCK": inputs.block_size,
            "ROW_TOKENS": rows.tokens,
            "COLUMN_TOKENS": columns.tokens,
            "IS_MIDDLE": rows.is_middle,
        }

    def choose_tiles(self) -> Iterator[Tiles]:
        """Return sizes of tiles for these rows and columns, the fastest first."""
        num_rows, num_columns = self.num_blocks * self.block_rows, self.num_blocks * self.block_columns
        element_size, parts = self.rows.data.element_size(), self.rows.data.shape[3]
        return choose_tiles(element_size, self.width, parts, num_rows, num_columns)

    def share(self, tiles: Tiles) -> Tensor:
        """Return the shares, (B, H, num_blocks, num_blocks) float32, made for a number of query blocks at a time."""
        shares = self.inputs.query.new_empty(self.inputs.shape, dtype=torch.float32)
        piece = min(tiles.columns, self.block_columns)
        block_pieces = self.block_columns // piece
        a_block = 4 * self.batch * self.kv_heads * self.block_rows * self.num_blocks * block_pieces
        at_once = min(self.num_blocks, max(1, MASSES_AT_ONCE_BYTES // a_block))
        layouts = tuple((x.shape, x.stride(), x.data_ptr() % 16 == 0) for x in (self.rows.start, self.columns.start))
        settings = tuple(self.constants.values()), at_once, tiles
        launcher = Launcher((shares.device, self.rows.data.dtype, self.inputs.query.shape, layouts, settings))
        for first in range(0, self.num_blocks, at_once):
            last = min(first + at_once, self.num_blocks)
            self._share_blocks(first, last, piece, tiles, shares, launcher)
        return shares

    def _share_blocks(
        self, first: int, last: int, piece: int, tiles: Tiles, shares: Tensor, launcher: Launcher
    ) -> None:
        inputs, kv_heads = self.inputs, self.batch * self.kv_heads
        block_pieces = self.block_columns // piece
        num_rows, num_pieces = (last - first) * self.block_rows, last * block_pieces
        row_tiles = cdiv(num_rows, tiles.rows)
        column_tiles = cdiv(last * self.block_columns, tiles.columns)
        # A program of several parts gains nothing from more than a few tiles: it loads its rows anew for each.
        parts = self.rows.data.shape[3]
        chunk_tiles = min(32 if parts == 1 else 4, max(1, column_tiles * row_tiles * kv_heads // SCORE_PROGRAMS))
        num_chunks = cdiv(column_tiles, chunk_tiles)
        masses = shares.new_empty(kv_heads, num_pieces, num_rows)
        chunk_masses = shares.new_empty(kv_heads, num_chunks, num_rows)
        launcher.run(
            score_pieces,
            (row_tiles * num_chunks, kv_heads),
            (
                self.rows.start,
                self.columns.start,
                masses,
                chunk_masses,
                self.scale * math.log2(math.e),
                inputs.query.shape[2],
                first,
                num_rows,
                num_pieces,
                row_tiles,
                num_chunks,
                chunk_tiles,
                self.kv_heads,
                *self.rows.strides,
                *self.columns.strides,
            ),
            {
                **self.constants,
                "PARTS": parts,
                "HEAD_DIM": inputs.query.shape[-1],
                "WIDTH": self.width,
                "FEATURES": tiles.features,
                "ROWS": tiles.rows,
                "COLUMNS": tiles.columns,
                "PIECE": piece,
                "NEIGHBOURS": 64 if parts == 1 else 8,
                "PRECISION": "tf32x3" if self.rows.data.dtype == torch.float32 else "tf32",
            },
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            most_registers=tiles.most_registers,
            variant=first,
        )
        tile = min(128, max(16, 2048 * self.rows.tokens // inputs.block_size))
        launcher.run(
            pool_pieces,
            (cdiv(self.num_blocks, tile), last - first, self.batch * self.heads),
            (
                masses,
                chunk_masses,
                shares,
                inputs.query.shape[2],
                first,
                num_rows,
                num_pieces,
                num_chunks,
                chunk_tiles * tiles.columns,
                self.num_blocks,
                self.heads,
            ),
            {**self.constants, "BLOCK_PIECES": block_pieces, "TILE": tile},
            num_warps=4,
            variant=first,
        )
