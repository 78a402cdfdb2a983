"""The launches that choose blocks by what was read of the inputs, and pack them.

    estimate_attention -> find_map_thresholds, or narrow_thresholds in turns for large maps -> pack_blocks

Heads that are not query-aware leave the kernels for maps at once.
"""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

from ...layout import BlockTables, count_blocks
from ..launch import cdiv, next_power_of_2
from ..packing import pack_blocks
from .maps import (
    ABOVE_ONE,
    estimate_attention,
    find_map_thresholds,
    narrow_thresholds,
)
from .reading import Reading

MAPS_AT_ONCE_BYTES = 2**29  # of pooled attention, float32: more heads take more launches
MOST_BLOCKS_HELD = 256  # a side of a map that fits the registers of one program


def choose_blocks(reading: Reading, width: int) -> BlockTables:
    """Choose and pack by the patterns of the heads, a number of heads at a time; ``width`` is of the indices."""
    num_heads, num_blocks = reading.batch * reading.heads, reading.num_blocks
    at_once = min(num_heads, max(1, MAPS_AT_ONCE_BYTES // (4 * num_blocks**2)))
    has_maps = reading.config.tau > 0
    maps = reading.profiles.new_empty(at_once if has_maps else 0, num_blocks, num_blocks)
    choice = _Choice(reading, maps, width)
    for first in range(0, num_heads, at_once):
        choice.choose(first, min(at_once, num_heads - first))
    return choice.tables


def choose_blocks_by_row(reading: Reading, scores: Tensor, width: int) -> BlockTables:
    """Choose and pack the fewest blocks with which each row of the scores reaches gamma."""
    choice = _Choice(reading, scores, width)
    choice.pack(0, reading.batch * reading.heads, by_row=True)
    return choice.tables


class _Choice:
    """The buffers of a choice: maps of the attention of some heads, and the tables to fill."""

    def __init__(self, reading: Reading, maps: Tensor, width: int) -> None:
        self.reading, self.maps = reading, maps
        counts = (reading.batch, reading.heads, reading.num_blocks)
        self.tables = BlockTables(
            *(reading.patterns.new_empty(shape, dtype=torch.int32) for shape in (counts, (*counts, width)) * 2)
        )

    def choose(self, first: int, count: int) -> None:
        """Choose and pack for ``count`` heads of B * H, from number ``first`` on."""
        if self.reading.config.tau > 0:
            self._estimate(first, count)
            if min(self.reading.config.gammas) < 1:
                search = self._find if self.reading.num_blocks <= MOST_BLOCKS_HELD else self._narrow
                search(first, count)
        self.pack(first, count)

    def _estimate(self, first: int, count: int) -> None:
        """Fill the maps of the query-aware heads."""
        reading, num_blocks = self.reading, self.reading.num_blocks
        tile = 64
        reading.run(
            estimate_attention,
            (cdiv(num_blocks, tile), count),
            (
                reading.pooled_query,
                reading.pooled_key,
                reading.patterns,
                self.maps,
                reading.scale * math.log2(math.e),
                first,
                num_blocks,
                reading.heads,
                reading.kv_heads,
            ),
            {
                "HEAD_DIM": reading.head_dim,
                "WIDTH": reading.width,
                "TILE": tile,
            },
            num_warps=4,
            num_stages=1,
        )

    def _find(self, first: int, count: int) -> None:
        """Find the thresholds of maps that one program can hold."""
        reading, num_blocks = self.reading, self.reading.num_blocks
        columns = max(16, next_power_of_2(num_blocks))
        reading.run(
            find_map_thresholds,
            (count,),
            (
                self.maps,
                reading.patterns,
                reading.thresholds,
                reading.last_ties,
                reading.gammas,
                reading.config.gammas[0],
                first,
                num_blocks,
                reading.heads,
            ),
            {
                "ROWS": columns // 2,
                "COLUMNS": columns,
                "HAS_GAMMAS": reading.has_gammas,
            },
            num_warps=max(4, columns // 8),
        )

    def _narrow(self, first: int, count: int) -> None:
        """Find the thresholds of large maps, in as many turns as their bits can need."""
        reading = self.reading
        sections, chunks = 8, 64
        # Were every entry smaller, all of them together could be left out.
        smallest = 1.998 * (1 - max(reading.config.gammas)) / (reading.num_blocks + 1)
        (lowest,) = struct.unpack("i", struct.pack("f", smallest))
        span, num_turns = ABOVE_ONE.value - lowest, 0
        while span > 1:
            span = -(-span // (sections + 1))
            num_turns += 1
        brackets = reading.patterns.new_empty(num_turns, count, 2)
        masses = reading.profiles.new_empty(num_turns, count, chunks, sections)
        for turn in range(num_turns + 1):
            reading.run(
                narrow_thresholds,
                (chunks if turn < num_turns else 1, count),
                (
                    self.maps,
                    reading.patterns,
                    brackets,
                    masses,
                    reading.thresholds,
                    reading.last_ties,
                    reading.gammas,
                    reading.config.gammas[0],
                    lowest,
                    turn,
                    num_turns,
                    first,
                    reading.num_blocks,
                    reading.heads,
                ),
                {
                    "TILE": min(next_power_of_2(reading.num_blocks), 256),
                    "CHUNKS": chunks,
                    "SECTIONS": sections,
                    "HAS_GAMMAS": reading.has_gammas,
                },
                num_warps=2,
            )

    def pack(self, first: int, count: int, *, by_row: bool = False) -> None:
        """Pack the blocks that reach the thresholds or, by row, the fewest that reach gamma."""
        reading = self.reading
        config, num_blocks = reading.config, reading.num_blocks
        reading.run(
            pack_blocks,
            (count * num_blocks,),
            (
                reading.profiles,
                self.maps,
                reading.patterns,
                reading.thresholds,
                reading.last_ties,
                reading.key_peak,
                reading.value_peak,
                reading.gammas,
                config.gammas[0],
                *self.tables,
                first,
                num_blocks,
                reading.heads,
                reading.kv_heads,
                self.tables.full_kv_indices.shape[-1],
                count_blocks(config.min_budget, reading.block_size),
                0 if config.max_budget is None else config.max_budget // reading.block_size,
                max(0, reading.length - config.dense_last) // reading.block_size if config.dense_last else num_blocks,
            ),
            {
                "NUM_BLOCKS": next_power_of_2(num_blocks),
                "BY_ROW": by_row,
                "IS_DENSE": min(config.gammas) == 1,
                "HAS_GAMMAS": reading.has_gammas,
                "HAS_CEILING": config.max_budget is not None,
                "HAS_VALUE": reading.value is not None,
            },
            num_warps=max(1, min(8, num_blocks // 1024)),
        )
