"""The selection by pooled keys on a GPU: two launches, whose shapes depend on the sizes alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexprefill_compile.settings.config import SparsePrefillConfig

from ...gammas import place_gammas
from ...layout import BlockTables, count_blocks
from ...select import first_dense_block
from ..launch import Launcher, cdiv, next_power_of_2, run_first_that_fits
from . import POOL_TOKENS, QUERY_STRIDE
from .keys import pool_keys
from .select import select_by_pools

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LARGEST_HEAD_DIM = 256
MOST_BLOCKS = 16384  # a row of the grid is one vector of registers
MOST_MASSES = 2**27  # in a buffer of their own: half a GiB


class Tile(NamedTuple):
    """The sizes of a program of ``select_by_pools``.

    Attributes:
        rows: Sampled queries, of one or more segments.
        columns: Means of keys that are scored at a time.
        num_warps: Of the program.
        num_stages: Tiles of means that are on their way at a time.
        entries: Masses for which thresholds are sought at a time.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    entries: int


def can_select(query: Tensor, value: Tensor | None, config: SparsePrefillConfig) -> bool:
    """Tell whether the kernels take these inputs."""
    value_dim = 0 if value is None else value.shape[-1]
    return (
        query.dtype in _DTYPES
        and max(query.shape[-1], value_dim) <= _LARGEST_HEAD_DIM
        and count_blocks(query.shape[-2], config.block_size) <= MOST_BLOCKS
    )


def try_select(
    query: Tensor, key: Tensor, value: Tensor | None, scale: float, config: SparsePrefillConfig, width: int
) -> BlockTables | None:
    """Select by the kernels, or return None where they don't take the inputs or the GPU is too small for a tile."""
    if not can_select(query, value, config):
        return None

    return run_on_device(query, lambda: select_tables(query, key, value, scale, config, width))


def run_on_device(query: Tensor, select: Callable[[], BlockTables]) -> BlockTables | None:
    """Select on the GPU of the query, or return None where it is too small for a tile."""

    def run() -> BlockTables:
        if query.device.index == torch.cuda.current_device():  # entering a context takes as long as a launch
            return select()
        with torch.cuda.device_of(query):
            return select()

    return run_first_that_fits([run], "blocks are selected")


def select_tables(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    scale: float,
    config: SparsePrefillConfig,
    width: int,
    tile: Tile | None = None,
) -> BlockTables:
    """Select and pack the blocks of causal attention by pooled keys.

    The blocks are those of ``select_prefill_blocks``, but for masses within rounding of a threshold, and for NaN and
    inf in queries: they fill the row that they reach, not the head. Beside the tables, memory holds the means of the
    keys, and with a ceiling four bytes for each block of the grid, up to ``MOST_MASSES`` of them.

    Args:
        query: (B, H, S, D), one of float16, bfloat16 and float32, any strides.
        key: (B, Hkv, S, D), of the same dtype.
        value: (B, Hkv, S, Dv), read for its NaN and inf only; None skips that.
        scale: Factor on the scores.
        config: What to select.
        width: Columns of the tables' indices.
        tile: Sizes of a program, chosen by default.
    """
    inputs = (query, key) if value is None else (query, key, value)
    layouts = tuple((x.shape, x.stride(), x.data_ptr() % 16 == 0) for x in inputs)
    plan = _recall_plan(query.device, query.dtype, layouts, config, width, scale, tile)
    return plan.run(query, key, value)


@functools.lru_cache(maxsize=1024)
def _recall_plan(*signature: Any) -> _Plan:
    return _Plan(*signature)


class _Plan:
    """All of the two launches that follows from sizes and settings."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        layouts: tuple[tuple[torch.Size, tuple[int, ...], bool], ...],
        config: SparsePrefillConfig,
        width: int,
        scale: float,
        tile: Tile | None,
    ) -> None:
        (query, query_strides, _), (key, key_strides, _), *values = layouts
        value, value_strides, _ = values[0] if values else (key, key_strides, None)
        self.batch, self.heads, length, head_dim = query
        self.kv_heads, block_size = key[1], config.block_size
        self.num_blocks = count_blocks(length, block_size)
        self.group = group = self.heads // self.kv_heads
        self.batch_kv_heads = batch_kv_heads = self.batch * self.kv_heads
        pool = min(POOL_TOKENS, block_size)
        keys, samples = block_size // pool, block_size // QUERY_STRIDE
        lanes, value_lanes = (max(16, next_power_of_2(size)) for size in (head_dim, value[-1]))
        self.tile = tile = tile or choose_tile(dtype.itemsize, lanes, keys, samples, self.num_blocks * group)
        num_tiles = cdiv(self.num_blocks * group, tile.rows // samples)
        pitch = cdiv(self.num_blocks * keys, tile.columns) * tile.columns
        self.num_means = batch_kv_heads * (pitch * head_dim + 2 * self.num_blocks)  # and faults
        self.counts = (self.batch, self.heads, self.num_blocks)
        self.indices = (*self.counts, width)
        self.has_room = width >= self.num_blocks  # for the masses of a row where its indices will lie
        self.segments = own = tile.rows // samples  # of a tile
        # Else the query blocks take turns in a buffer. Those of a tile may stand in one block more than they fill.
        in_turn = max(own // group + 2, MOST_MASSES // (self.batch * self.heads * self.num_blocks))
        mass_blocks = self.num_blocks if self.has_room else min(in_turn, self.num_blocks)
        tiles_in_turn = num_tiles if mass_blocks == self.num_blocks else (mass_blocks - 1) * group // own
        starts = range(0, num_tiles, tiles_in_turn)
        self.turns = [(start, min(start + tiles_in_turn, num_tiles)) for start in starts]
        self.masses = (self.batch, self.heads, mass_blocks, self.num_blocks)
        self.config, self.has_gammas = config, len(config.gammas) > 1
        self.launcher = Launcher(("pooled", device, dtype, layouts, config, width, tile))
        shared = {
            "length": length,
            "num_blocks": self.num_blocks,
            "kv_heads": self.kv_heads,
            "batch_kv_heads": batch_kv_heads,
            "pitch": pitch,
            "HEAD_DIM": head_dim,
            "WIDTH": lanes,
            "BLOCK": block_size,
            "POOL": pool,
        }
        self.key_grid = (self.num_blocks, batch_kv_heads, 2 if values else 1)
        self.key_arguments = {
            **shared,
            **name_strides("key", key_strides),
            **name_strides("value", value_strides),
            "VALUE_DIM": value[-1],
            "VALUE_WIDTH": value_lanes,
            "TOKENS": min(block_size, max(pool, 16384 // max(lanes, value_lanes))),
        }
        columns = next_power_of_2(self.num_blocks)
        self.arguments = {
            **shared,
            **name_strides("query", query_strides),
            "scale_log2e": scale * math.log2(math.e),
            "gamma": config.gammas[0],
            "mass_blocks": mass_blocks,
            "mass_width": max(width, self.num_blocks),
            "width": width,
            "min_blocks": count_blocks(config.floor_at(length), block_size),
            "max_blocks": 0 if config.max_budget is None else config.max_budget // block_size,
            "first_dense": first_dense_block(length, config),
            "GROUP": group,
            "STRIDE": QUERY_STRIDE,
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "NUM_BLOCKS": columns,
            "AT_ONCE": min(tile.rows // samples, max(1, tile.entries // columns)),
            "HAS_GAMMAS": self.has_gammas,
            "HAS_CEILING": config.max_budget is not None,
            "HAS_VALUE": bool(values),
            "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
            "NUM_STAGES": tile.num_stages,
        }

    def run(self, query: Tensor, key: Tensor, value: Tensor | None) -> BlockTables:
        """Launch, on inputs of the plan's signature."""
        tables = BlockTables(
            kv_num_blocks=query.new_empty(self.counts, dtype=torch.int32),
            kv_indices=query.new_empty(self.indices, dtype=torch.int32),
            full_kv_num_blocks=query.new_empty(self.counts, dtype=torch.int32),
            full_kv_indices=query.new_empty(self.indices, dtype=torch.int32),
        )
        means = query.new_empty(self.num_means)
        inputs = {"key": key, "value": key if value is None else value, "means": means}
        self.launcher.run(pool_keys, self.key_grid, self.key_arguments | inputs, num_warps=4)
        buffers = {
            "query": query,
            "means": means,
            "gammas": place_gammas(self.config, query.device, torch.float32) if self.has_gammas else means,
            "masses": tables.full_kv_indices if self.has_room else query.new_empty(self.masses, dtype=torch.int32),
            "diagonal_counts": tables.kv_num_blocks,
            "diagonal_indices": tables.kv_indices,
            "full_counts": tables.full_kv_num_blocks,
            "full_indices": tables.full_kv_indices,
        }
        for first, stop in self.turns:
            turn = {"last_tile": stop - 1, "first_mass_block": first * self.segments // self.group}
            self.launcher.run(
                select_by_pools,
                ((stop - first) * self.batch_kv_heads,),
                self.arguments | buffers | turn,
                num_warps=self.tile.num_warps,
                variant=first,
            )
        return tables


def name_strides(tensor: str, strides: tuple[int, ...]) -> dict[str, int]:
    """Return the strides of (B, H, S, D) as a kernel takes them."""
    names = (f"{tensor}_{axis}" for axis in ("batch", "head", "token", "feature"))
    return dict(zip(names, strides, strict=True))


def choose_tile(element_size: int, lanes: int, keys: int, samples: int, num_segments: int) -> Tile:
    """Return the sizes of a program."""
    rows, columns, num_stages = (64, 64, 3) if element_size == 2 else (64, 32, 2)
    if lanes > 128:
        num_stages = 2
    rows = max(16, samples, min(rows, next_power_of_2(num_segments) * samples))
    return Tile(rows, max(columns, 4 * keys), num_warps=4, num_stages=num_stages, entries=1024)
