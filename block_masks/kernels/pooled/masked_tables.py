"""The selection by pooled keys under a mask on a GPU: two launches, whose shapes depend on the sizes alone."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from flexprefill_compile.settings.config import SparsePrefillConfig

from ...gammas import place_gammas
from ...layout import BlockTables, count_blocks
from ...masks.facts import MaskFacts
from ..launch import Launcher, cdiv, next_power_of_2
from . import POOL_TOKENS, QUERY_STRIDE
from .masked_inputs import read_masked_inputs
from .masked_select import select_by_masked_pools
from .tables import MOST_BLOCKS, Tile, can_select, choose_tile, name_strides, run_on_device

_WORD_BITS = 32
_MARK_ROWS = 16  # query blocks whose kinds a program writes
_LOOKED_AT_ONCE = 2048  # words that a program looks at together
_MOST_REGISTERS = 168  # a thread: three programs share a multiprocessor, as many as its memory holds
# The facts that the kernels read, and their dimensions before the contiguous ones.
_FACTS = {
    "certain": ("batch", "head"),
    "possible": ("batch", "head"),
    "required": ("batch", "head"),
    "key_counts": ("batch",),
    "query_counts": ("batch",),
    "first_block": ("batch", "step"),
    "last_rows": ("batch", "step"),
    "offset": (),
}

_Layout = tuple[torch.Size, tuple[int, ...], bool]


def try_select_masked(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    facts: MaskFacts,
    scale: float,
    softcap: float | None,
    config: SparsePrefillConfig,
) -> BlockTables | None:
    """Select by the kernels, or return None where they don't take the inputs or the GPU is too small for a tile."""
    if config.is_dense or not can_select(query, value, config):
        return None
    if count_blocks(key.shape[-2], config.block_size) > MOST_BLOCKS:
        return None
    return run_on_device(query, lambda: select_masked_tables(query, key, value, facts, scale, softcap, config))


def select_masked_tables(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    facts: MaskFacts,
    scale: float,
    softcap: float | None,
    config: SparsePrefillConfig,
    tile: Tile | None = None,
) -> BlockTables:
    """Select and pack the blocks of masked attention by pooled keys.

    The blocks are those of ``select_masked_prefill_blocks``, but for masses within rounding of a threshold, and for NaN
    and inf in queries: they fill the row that they reach, not the head, as in ``select_tables``. Beside the tables,
    memory holds the means of the keys, and a byte and two bits for each block of the mask's grid.

    Args:
        query: (B, H, Q, D), one of float16, bfloat16 and float32, any strides.
        key: (B, Hkv, K, D), of the same dtype.
        value: (B, Hkv, K, Dv), read for its NaN and inf only; None skips that.
        facts: Of the mask.
        scale: Factor on the scores.
        softcap: As of ``AttentionInputs``.
        config: What to select; not dense.
        tile: Sizes of a program, chosen by default.
    """
    inputs = (query, key) if value is None else (query, key, value)
    known = {
        "certain": _join_last(facts.certain),
        "possible": _join_last(facts.possible),
        "required": _join_last(facts.required),
        "key_counts": _join_last(facts.key_counts),
        "query_counts": _join_last(facts.query_counts),
        "first_block": facts.first_block,
        "last_rows": facts.rows,
        "offset": facts.offset,
    }
    layouts, fact_layouts = (
        tuple((x.shape, x.stride(), x.data_ptr() % 16 == 0) for x in tensors) for tensors in (inputs, known.values())
    )
    plan = _recall_plan(query.device, query.dtype, layouts, fact_layouts, config, scale, softcap, tile)
    return plan.run(query, key, value, known)


def _join_last(x: Tensor) -> Tensor:
    """Return ``x`` with contiguous last two dimensions."""
    return x if x.stride()[-2:] == (x.shape[-1], 1) else x.contiguous()


@functools.lru_cache(maxsize=1024)
def _recall_plan(*signature: Any) -> _MaskedPlan:
    return _MaskedPlan(*signature)


class _MaskedPlan:
    """All of the two launches that follows from sizes and settings."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        layouts: tuple[_Layout, ...],
        fact_layouts: tuple[_Layout, ...],
        config: SparsePrefillConfig,
        scale: float,
        softcap: float | None,
        tile: Tile | None,
    ) -> None:
        (query, query_strides, _), (key, key_strides, _), *values = layouts
        value, value_strides, _ = values[0] if values else (key, key_strides, None)
        facts = dict(zip(_FACTS, fact_layouts, strict=True))
        batch, heads, query_length, head_dim = query
        kv_heads, block_size = key[1], config.block_size
        num_q_blocks, num_k_blocks = (count_blocks(x[2], block_size) for x in (query, key))
        group, batch_kv_heads = heads // kv_heads, batch * kv_heads
        pool = min(POOL_TOKENS, block_size)
        keys, samples = block_size // pool, block_size // QUERY_STRIDE
        lanes, value_lanes = (max(16, next_power_of_2(size)) for size in (head_dim, value[-1]))
        num_segments = num_q_blocks * group
        tile = tile or choose_tile(dtype.itemsize, lanes, keys, samples, num_segments)
        self.tile = tile = tile._replace(columns=min(tile.columns, _WORD_BITS * keys))
        num_tiles, num_own = cdiv(num_segments, tile.rows // samples), tile.rows // samples
        num_key_tiles = cdiv(num_k_blocks * keys, tile.columns)
        pitch = num_key_tiles * tile.columns
        mask_batch, mask_heads = facts["possible"][0][:2]
        num_mark_rows = cdiv(num_q_blocks, _MARK_ROWS)
        self.num_means = batch_kv_heads * (pitch * head_dim + 2 * num_k_blocks)  # and faults
        self.log_weights = (batch, pitch)
        self.kinds = (mask_batch, mask_heads, num_q_blocks, num_k_blocks)
        self.words = (mask_batch, mask_heads, num_q_blocks, num_key_tiles, 2)
        self.counts = (batch, heads, num_q_blocks)
        self.config, self.has_gammas = config, len(config.gammas) > 1
        self.launcher = Launcher(("masked", device, dtype, layouts, fact_layouts, config, scale, softcap, tile))
        shared = {
            "num_q_blocks": num_q_blocks,
            "num_k_blocks": num_k_blocks,
            "num_key_tiles": num_key_tiles,
            "kv_heads": kv_heads,
            "batch_kv_heads": batch_kv_heads,
            "pitch": pitch,
            "HEAD_DIM": head_dim,
            "WIDTH": lanes,
            "BLOCK": block_size,
            "POOL": pool,
            "HAS_VALUE": bool(values),
        }
        num_marks = num_key_tiles * num_mark_rows * mask_batch * mask_heads
        self.reading_grid = (num_k_blocks * batch_kv_heads * (2 if values else 1) + num_marks,)
        self.reading = {
            **shared,
            **name_strides("key", key_strides),
            **name_strides("value", value_strides),
            **_name_fact_strides(facts, "certain", "possible", "required", "key_counts", "query_counts", "first_block"),
            "key_length": key[2],
            "num_mark_rows": num_mark_rows,
            "mask_heads": mask_heads,
            "VALUE_DIM": value[-1],
            "VALUE_WIDTH": value_lanes,
            "TOKENS": min(block_size, max(pool, 8192 // max(lanes, value_lanes))),
            "TILE_BLOCKS": tile.columns // keys,
            "MARK_ROWS": _MARK_ROWS,
        }
        width = next_power_of_2(num_k_blocks)
        self.grid = (num_tiles * batch_kv_heads,)
        self.selection = {
            **shared,
            **name_strides("query", query_strides),
            **_name_fact_strides(facts, "query_counts", "last_rows"),
            "mask_batch": 0 if mask_batch == 1 else mask_heads,
            "mask_head": 0 if mask_heads == 1 else 1,
            "scale_log2e": scale * math.log2(math.e),
            "cap_log2e": (softcap or 0.0) * math.log2(math.e),
            "gamma": config.gammas[0],
            "query_length": query_length,
            "num_tiles": num_tiles,
            "min_blocks": count_blocks(config.floor_at(key[2]), block_size),
            "max_blocks": 0 if config.max_budget is None else config.max_budget // block_size,
            "dense_last": config.dense_last,
            "GROUP": group,
            "STRIDE": QUERY_STRIDE,
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "NUM_BLOCKS": width,
            "AT_ONCE": min(num_own, max(1, tile.entries // width)),
            "LOOKED": min(next_power_of_2(num_key_tiles), max(1, _LOOKED_AT_ONCE // num_own)),
            "HAS_CAP": softcap is not None,
            "HAS_GAMMAS": self.has_gammas,
            "HAS_CEILING": config.max_budget is not None,
            "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
            "NUM_STAGES": tile.num_stages,
        }

    def run(self, query: Tensor, key: Tensor, value: Tensor | None, facts: dict[str, Tensor]) -> BlockTables:
        """Launch, on inputs of the plan's signature."""
        indices = (*self.counts, self.kinds[-1])
        tables = BlockTables(
            kv_num_blocks=query.new_empty(self.counts, dtype=torch.int32),
            kv_indices=query.new_empty(indices, dtype=torch.int32),
            full_kv_num_blocks=query.new_empty(self.counts, dtype=torch.int32),
            full_kv_indices=query.new_empty(indices, dtype=torch.int32),
        )
        means = query.new_empty(self.num_means)
        buffers = {
            "means": means,
            "log_weights": query.new_empty(self.log_weights, dtype=torch.float32),
            "kinds": query.new_empty(self.kinds, dtype=torch.uint8),
            "words": query.new_empty(self.words, dtype=torch.int32),
        }
        last_rows, offset = facts["last_rows"], facts["offset"]
        known = {name: x for name, x in facts.items() if name not in ("last_rows", "offset")}
        inputs = {"key": key, "value": key if value is None else value, **known, **buffers}
        self.launcher.run(read_masked_inputs, self.reading_grid, self.reading | inputs, num_warps=4)
        outputs = {
            "query": query,
            "query_counts": facts["query_counts"],
            "last_rows": last_rows,
            "offset": offset,
            "gammas": place_gammas(self.config, query.device, torch.float32) if self.has_gammas else means,
            "partial_counts": tables.kv_num_blocks,
            "partial_indices": tables.kv_indices,
            "full_counts": tables.full_kv_num_blocks,
            "full_indices": tables.full_kv_indices,
        }
        arguments = self.selection | buffers | outputs
        self.launcher.run(
            select_by_masked_pools,
            self.grid,
            arguments,
            num_warps=self.tile.num_warps,
            most_registers=_MOST_REGISTERS,
        )
        return tables


def _name_fact_strides(facts: dict[str, _Layout], *names: str) -> dict[str, int]:
    """Return the strides of facts as kernels take them, 0 where one serves all."""
    return {
        f"{name}_{axis}": 0 if facts[name][0][dim] == 1 else facts[name][1][dim]
        for name in names
        for dim, axis in enumerate(_FACTS[name])
    }
