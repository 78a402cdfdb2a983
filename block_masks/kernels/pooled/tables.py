"""The selection by pooled keys on a GPU: two launches, whose shapes depend on the sizes alone."""

from __future__ import annotations

import functools
import logging
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from flexprefill_compile.settings.config import SparsePrefillConfig

from ...estimators.pooled import POOL_TOKENS, QUERY_STRIDE
from ...gammas import place_gammas
from ...layout import BlockTables, count_blocks
from ..launch import Launcher, cdiv, next_power_of_2
from .keys import pool_keys
from .select import select_by_pools

logger = logging.getLogger(__name__)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_HEAD_DIM = 256
MOST_BLOCKS = 16384  # a row of the grid is one vector of registers


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
        query.dtype in DTYPES
        and max(query.shape[-1], value_dim) <= LARGEST_HEAD_DIM
        and count_blocks(query.shape[-2], config.block_size) <= MOST_BLOCKS
    )


def try_select(
    query: Tensor, key: Tensor, value: Tensor | None, scale: float, config: SparsePrefillConfig, width: int
) -> BlockTables | None:
    """Select by the kernels, or return None where they don't take the inputs or the GPU is too small for a tile."""
    if not can_select(query, value, config):
        return None
    try:
        if query.device.index == torch.cuda.current_device():  # entering a context takes as long as a launch
            return select_tables(query, key, value, scale, config, width)
        with torch.cuda.device_of(query):
            return select_tables(query, key, value, scale, config, width)
    except triton.OutOfResources as error:
        logger.warning("blocks are selected by plain PyTorch, slower: %s", error)
        return None


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
    keys, and with a ceiling four bytes for each block of the grid.

    Args:
        query: (B, H, S, D), one of ``DTYPES``, any strides.
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
        group, batch_kv_heads = self.heads // self.kv_heads, self.batch * self.kv_heads
        pool = min(POOL_TOKENS, block_size)
        keys, samples = block_size // pool, block_size // QUERY_STRIDE
        lanes = max(16, next_power_of_2(head_dim))
        tile = tile or choose_tile(dtype.itemsize, lanes, keys, samples, self.num_blocks * group)
        num_tiles = cdiv(self.num_blocks * group, tile.rows // samples)
        pitch = cdiv(self.num_blocks * keys, tile.columns) * tile.columns
        self.num_means = batch_kv_heads * (pitch * head_dim + 2 * self.num_blocks)  # and faults
        self.counts = (self.batch, self.heads, self.num_blocks)
        self.indices = (*self.counts, width)
        self.mass_shape = None if width >= self.num_blocks else (*self.counts, self.num_blocks)
        value_lanes = max(16, next_power_of_2(value[-1]))
        self.config = config
        self.launcher = Launcher(("pooled", device, dtype, layouts, config, width, tile))
        self.key_grid = (self.num_blocks, batch_kv_heads, 2 if values else 1)
        self.key_sizes = (
            length,
            self.num_blocks,
            self.kv_heads,
            batch_kv_heads,
            pitch,
            *key_strides,
            *value_strides,
        )
        self.key_constants = {
            "HEAD_DIM": head_dim,
            "WIDTH": lanes,
            "VALUE_DIM": value[-1],
            "VALUE_WIDTH": value_lanes,
            "BLOCK": block_size,
            "POOL": pool,
            "TOKENS": min(block_size, max(pool, 16384 // max(lanes, value_lanes))),
        }
        self.tile = tile
        self.grid = (num_tiles * batch_kv_heads,)
        self.sizes = (
            scale * math.log2(math.e),
            config.gammas[0],
            length,
            self.num_blocks,
            num_tiles,
            self.kv_heads,
            batch_kv_heads,
            pitch,
            max(width, self.num_blocks),
            width,
            count_blocks(config.floor_at(length), block_size),
            0 if config.max_budget is None else config.max_budget // block_size,
            max(0, length - config.dense_last) // block_size if config.dense_last else self.num_blocks,
            *query_strides,
        )
        columns = next_power_of_2(self.num_blocks)
        self.has_gammas = len(config.gammas) > 1
        self.constants = {
            "GROUP": group,
            "BLOCK": block_size,
            "STRIDE": QUERY_STRIDE,
            "POOL": pool,
            "HEAD_DIM": head_dim,
            "WIDTH": lanes,
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
        full_indices = query.new_empty(self.indices, dtype=torch.int32)
        tables = BlockTables(
            query.new_empty(self.counts, dtype=torch.int32),
            query.new_empty(self.indices, dtype=torch.int32),
            query.new_empty(self.counts, dtype=torch.int32),
            full_indices,
        )
        means = query.new_empty(self.num_means)
        self.launcher.run(
            pool_keys,
            self.key_grid,
            (key, key if value is None else value, means, *self.key_sizes),
            self.key_constants,
            num_warps=4,
        )
        gammas = place_gammas(self.config, query.device, torch.float32) if self.has_gammas else means
        # The masses of a row lie where its indices will, if there is room.
        masses = full_indices if self.mass_shape is None else query.new_empty(self.mass_shape, dtype=torch.int32)
        self.launcher.run(
            select_by_pools,
            self.grid,
            (query, means, gammas, masses, *tables, *self.sizes),
            self.constants,
            num_warps=self.tile.num_warps,
        )
        return tables


def choose_tile(element_size: int, lanes: int, keys: int, samples: int, num_segments: int) -> Tile:
    """Return the sizes of a program."""
    rows, columns, num_warps, num_stages = (128, 64, 8, 3) if element_size == 2 else (64, 32, 4, 2)
    if lanes > 128:
        num_stages = 2
    rows = max(16, samples, min(rows, next_power_of_2(num_segments) * samples))
    num_warps = num_warps if rows >= 64 else 4
    return Tile(rows, max(columns, 4 * keys), num_warps, num_stages, 256 * num_warps)
