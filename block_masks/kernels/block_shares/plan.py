"""The sizes of one computation of shares: its rows and columns, its tiles, and its turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from ...attention_inputs import AttentionInputs
from ..launch import cdiv, next_power_of_2

# Enough programs to fill the largest GPU of today a few times over.
_SCORE_PROGRAMS = 1024


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


class Turn(NamedTuple):
    """The sizes of the launches for some query blocks, those from ``first`` up to ``last``.

    Attributes:
        first: The first query block.
        last: The one after the last query block.
        num_rows: Rows of these blocks, of all heads of a group.
        num_pieces: Pieces of the key blocks that they see.
        row_tiles: Tiles of rows.
        num_chunks: Chunks of columns.
        chunk_tiles: Tiles of columns in a chunk.
    """

    first: int
    last: int
    num_rows: int
    num_pieces: int
    row_tiles: int
    num_chunks: int
    chunk_tiles: int


class SharePlan:
    """The sizes that all launches of one computation of shares have in common."""

    def __init__(self, inputs: AttentionInputs, rows: Vectors, columns: Vectors, scale: float, tiles: Tiles) -> None:
        self.inputs, self.rows, self.columns, self.scale, self.tiles = inputs, rows, columns, scale, tiles
        self.batch, self.heads, self.num_blocks, _ = inputs.shape
        self.kv_heads = inputs.key.shape[1]
        self.group = self.heads // self.kv_heads
        self.block_rows = self.group * (inputs.block_size // rows.tokens)  # of all heads of a group
        self.block_columns = inputs.block_size // columns.tokens
        self.parts = rows.data.shape[3]
        self.width = max(16, next_power_of_2(inputs.query.shape[-1]))
        self.piece = min(tiles.columns, self.block_columns)
        self.block_pieces = self.block_columns // self.piece
        self.constants = {
            "GROUP": self.group,
            "BLOCK": inputs.block_size,
            "ROW_TOKENS": rows.tokens,
            "COLUMN_TOKENS": columns.tokens,
            "IS_MIDDLE": rows.is_middle,
        }

    @property
    def block_masses(self) -> int:
        """How many masses a block of queries has, of all heads."""
        return self.batch * self.kv_heads * self.block_rows * self.num_blocks * self.block_pieces

    def size_turn(self, first: int, last: int) -> Turn:
        """Return the sizes of the launches for the query blocks from ``first`` up to ``last``."""
        num_rows, kv_heads = (last - first) * self.block_rows, self.batch * self.kv_heads
        row_tiles = cdiv(num_rows, self.tiles.rows)
        column_tiles = cdiv(last * self.block_columns, self.tiles.columns)
        # A program of several parts gains nothing from more than a few tiles: it loads its rows anew for each.
        most_tiles = 32 if self.parts == 1 else 4
        chunk_tiles = min(most_tiles, max(1, column_tiles * row_tiles * kv_heads // _SCORE_PROGRAMS))
        num_chunks = cdiv(column_tiles, chunk_tiles)
        return Turn(first, last, num_rows, last * self.block_pieces, row_tiles, num_chunks, chunk_tiles)


def choose_tiles(inputs: AttentionInputs, rows: Vectors, columns: Vectors) -> Iterator[Tiles]:
    """Yield sizes of tiles, the fastest first, the ones that need the least shared memory last."""
    _, heads, num_blocks, _ = inputs.shape
    num_rows = num_blocks * (heads // inputs.key.shape[1]) * (inputs.block_size // rows.tokens)
    num_columns = num_blocks * (inputs.block_size // columns.tokens)
    parts, width = rows.data.shape[3], max(16, next_power_of_2(inputs.query.shape[-1]))
    # Rows of one part are held while columns pass by. The powers of 2 keep the matrix units waiting: at 128 registers,
    # another program fills in. Rows of several parts pass by like the columns do; they have few powers.
    sizes = [Tiles(128, 128, width, 8, 2, 128), Tiles(64, 64, width, 4, 2), Tiles(32, 32, width, 4, 1)]
    if parts > 1 or width > 128:
        sizes = [Tiles(128, 256, 64, 8, 3), Tiles(128, 128, 64, 8, 2), Tiles(64, 64, 32, 4, 2), Tiles(32, 32, 32, 4, 1)]
    if rows.data.element_size() > 2:
        sizes = [Tiles(64, 64, 32, 4, 2), Tiles(32, 32, 32, 4, 1)]
    for tiles in sizes:
        yield tiles._replace(
            rows=min(tiles.rows, max(16, next_power_of_2(num_rows))),
            columns=min(tiles.columns, max(16, next_power_of_2(num_columns))),
            features=min(tiles.features, width),
        )
