"""The selection of ``prefill.select_prefill_blocks`` on a GPU, by Triton kernels.

    pool_inputs -> score_representative -> pool_masses -> choose_patterns
        -> estimate_attention -> find_thresholds (-> narrow_thresholds, in turns, for large maps) -> pack_blocks

Launch shapes depend on the sizes alone; which heads are query-aware is decided on the device.
"""

from __future__ import annotations

import logging
import math
import struct

import torch
import triton
from torch import Tensor

from flexprefill_compile.block_masks.gammas import place_gammas
from flexprefill_compile.block_masks.layout import BlockTables, count_blocks
from flexprefill_compile.block_masks.triton_launch import Launcher
from flexprefill_compile.block_masks.triton_representative import (
    QUERY_AWARE,
    choose_patterns,
    pool_inputs,
    pool_masses,
    score_representative,
)
from flexprefill_compile.block_masks.triton_selection import (
    ABOVE_ONE,
    estimate_attention,
    find_thresholds,
    narrow_thresholds,
    pack_blocks,
)
from flexprefill_compile.config import SparsePrefillConfig

logger = logging.getLogger(__name__)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_HEAD_DIM = 256
MOST_BLOCKS = 16384  # a row of the grid is one vector of registers
MAPS_AT_ONCE_BYTES = 2**29  # of pooled attention, float32: more heads take more launches
MOST_BLOCKS_SMALL = 128  # a map of more is searched by several programs
# Enough programs to fill the largest GPU of today a few times over.
SCORE_PROGRAMS = 512


def try_select(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    scale: float,
    config: SparsePrefillConfig,
    width: int,
) -> BlockTables | None:
    """Select by the kernels, or return None where they don't take the inputs or the GPU is too small for a tile."""
    if not can_select(query, value, config):
        return None
    try:
        return select_prefill_tables(query, key, value, scale, config, width)
    except triton.OutOfResources as error:
        logger.warning("blocks are selected by plain PyTorch, slower: %s", error)
        return None


def try_select_scored(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    scores: Tensor,
    config: SparsePrefillConfig,
    width: int,
) -> BlockTables | None:
    """Select by an estimator's scores, or return None where the GPU is too small for a tile."""
    try:
        return select_scored_tables(query, key, value, scores, config, width)
    except triton.OutOfResources as error:
        logger.warning("blocks are selected by plain PyTorch, slower: %s", error)
        return None


def can_select(query: Tensor, value: Tensor | None, config: SparsePrefillConfig) -> bool:
    """Tell whether the kernels take these inputs."""
    value_dim = 0 if value is None else value.shape[-1]
    return (
        query.dtype in DTYPES
        and max(query.shape[-1], value_dim) <= LARGEST_HEAD_DIM
        and count_blocks(query.shape[-2], config.block_size) <= MOST_BLOCKS
    )


def select_prefill_tables(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    scale: float,
    config: SparsePrefillConfig,
    width: int,
) -> BlockTables:
    """Select and pack the blocks of causal attention.

    The blocks are those of ``select_prefill_blocks``, but for masses within rounding of a threshold. Beside the
    result, memory peaks at the pooled query, at four numbers for each 1 / block_size of the representative scores, and
    at the maps of pooled attention, (B, H, num_blocks, num_blocks) float32 or ``MAPS_AT_ONCE_BYTES``, whichever is
    less, but no less than one map.

    Args:
        query: (B, H, S, D), one of ``DTYPES``, any strides.
        key: (B, Hkv, S, D), of the same dtype.
        value: (B, Hkv, S, Dv), read for its NaN and inf only; None is not to look.
        scale: Factor on the scores.
        config: What to select.
        width: Columns of the tables' indices.
    """
    with torch.cuda.device_of(query):
        launch = _Launch(query, key, value, scale, config)
        launch.read_inputs()
        return launch.select(width)


def select_scored_tables(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    scores: Tensor,
    config: SparsePrefillConfig,
    width: int,
) -> BlockTables:
    """Select and pack, for each row of the scores, the fewest blocks that reach gamma; then as above.

    Args:
        query: As above.
        key: As above.
        value: As above.
        scores: (B, H, num_blocks, num_blocks) float32, not negative and zero above the diagonal.
        config: What to select, but for the estimator.
        width: Columns of the tables' indices.
    """
    with torch.cuda.device_of(query):
        launch = _Launch(query, key, value, 1.0, config)
        launch.read_scores(scores)
        return launch.select_by_row(scores.contiguous(), width)


def choose_score_tiles(group_rows: int, block_size: int, width: int, element_size: int) -> tuple[int, int, int, int]:
    """Return the rows and keys of a tile of scores, its warps and its pipeline stages."""
    rows = min(64, max(16, triton.next_power_of_2(group_rows)))
    keys = min(block_size, 64 if element_size == 2 else max(16, 4096 // width))
    # A stage holds a whole key block.
    num_warps = 4 if width * element_size <= 256 else 8
    return rows, keys, num_warps, max(1, min(3, 2**17 * 3 // 4 // (block_size * width * element_size)))


class _Launch:
    """The buffers of one selection."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor | None, scale: float, config: SparsePrefillConfig
    ) -> None:
        self.query, self.key, self.value, self.scale, self.config = query, key, value, scale, config
        # All that Triton compiles for: constants follow from shapes and settings.
        inputs = (query, key) if value is None else (query, key, value)
        layouts = tuple((x.shape, x.stride(), x.data_ptr() % 16 == 0) for x in inputs)
        signature = (query.device, query.dtype, layouts, config)
        self.run = Launcher(signature).run
        self.batch, self.heads, self.length, self.head_dim = query.shape
        self.kv_heads = key.shape[1]
        self.block_size = config.block_size
        self.num_blocks = count_blocks(self.length, self.block_size)
        self.num_rows = min(self.length, self.block_size)
        self.is_ragged = (self.length - self.num_rows) % self.block_size != 0
        self.width = max(16, triton.next_power_of_2(self.head_dim))

        def empty(*shape: int) -> Tensor:
            return query.new_empty(shape, dtype=torch.float32)

        heads, kv_heads = self.batch * self.heads, self.batch * self.kv_heads
        self.pooled_query = empty(heads, self.num_blocks + 1, self.head_dim)
        self.pooled_key = empty(kv_heads, self.num_blocks, self.head_dim)
        self.query_peak = empty(heads, self.num_blocks + 1)
        self.key_peak = empty(kv_heads, self.num_blocks)
        self.value_peak = empty(kv_heads, self.num_blocks)
        self.profiles = empty(heads, 2, self.num_blocks)
        self.patterns = query.new_empty(heads, dtype=torch.int32)
        gammas = place_gammas(config, query.device, torch.float32)
        self.has_gammas = isinstance(gammas, Tensor)
        self.gammas = gammas if isinstance(gammas, Tensor) else self.profiles  # read only if there are several

    def pool(self) -> None:
        """Pool queries and keys, and find the blocks that are not finite."""
        query, key, value = self.query, self.key, self.value
        looked_at = query if value is None else value
        value_width = triton.next_power_of_2(looked_at.shape[-1])
        kinds = self.heads + self.kv_heads * (1 if value is None else 2)
        self.run(
            pool_inputs,
            (self.num_blocks + 1, self.batch * kinds),
            (
                query,
                key,
                looked_at,
                self.pooled_query,
                self.pooled_key,
                self.query_peak,
                self.key_peak,
                self.value_peak,
                self.length,
                self.num_blocks,
                self.batch,
                self.heads,
                self.kv_heads,
                *query.stride(),
                *key.stride(),
                *looked_at.stride(),
            ),
            {
                "HEAD_DIM": self.head_dim,
                "VALUE_DIM": looked_at.shape[-1],
                "WIDTH": self.width,
                "VALUE_WIDTH": value_width,
                "BLOCK": self.block_size,
                "TOKENS": min(self.block_size, 16384 // max(self.width, value_width)),
            },
            num_warps=4,
        )

    def read_scores(self, scores: Tensor) -> None:
        """Choose the scores, (B, H, num_blocks, num_blocks), for heads that are finite, else every block."""
        self.pool()
        peak = self.key_peak.amax(-1) if self.value is None else (self.key_peak + self.value_peak).amax(-1)
        peak = self.query_peak.amax(-1) + peak.repeat_interleave(self.heads // self.kv_heads)
        is_finite = torch.isfinite(scores.sum((-2, -1)).view(-1)) & torch.isfinite(peak)
        self.patterns.copy_(is_finite).mul_(QUERY_AWARE.value)

    def read_inputs(self) -> None:
        """Pool the inputs, score the representative queries, and choose each head's pattern."""
        if self.config.is_dense:
            self.patterns.zero_()  # every block
            return
        self.pool()
        query, key, value = self.query, self.key, self.value
        group_rows = self.heads // self.kv_heads * self.num_rows
        rows, keys, num_warps, num_stages = choose_score_tiles(
            group_rows, self.block_size, self.width, query.element_size()
        )
        row_tiles = triton.cdiv(group_rows, rows)
        programs = row_tiles * self.batch * self.kv_heads
        chunk_blocks = max(1, self.num_blocks * programs // SCORE_PROGRAMS)
        num_chunks = triton.cdiv(self.num_blocks, chunk_blocks)
        masses = query.new_empty(
            (4 if self.is_ragged else 3, self.batch * self.kv_heads, self.num_blocks, group_rows), dtype=torch.float32
        )
        chunk_masses = query.new_empty((self.batch * self.kv_heads, num_chunks, group_rows), dtype=torch.float32)
        self.run(
            score_representative,
            (row_tiles, num_chunks, self.batch * self.kv_heads),
            (
                query,
                key,
                masses,
                chunk_masses,
                self.scale * math.log2(math.e),
                self.length,
                self.num_blocks,
                self.num_rows,
                group_rows,
                masses.stride(0),
                chunk_blocks,
                self.kv_heads,
                *query.stride(),
                *key.stride(),
            ),
            {
                "HEAD_DIM": self.head_dim,
                "WIDTH": self.width,
                "BLOCK": self.block_size,
                "ROWS": rows,
                "KEYS": keys,
                "IS_RAGGED": self.is_ragged,
                "PRECISION": "tf32x3" if query.dtype == torch.float32 else "tf32",
            },
            num_warps=num_warps,
            num_stages=num_stages,
        )

        pooled = query.new_empty((self.batch * self.heads, 5, self.num_blocks), dtype=torch.float32)
        tile = 16
        self.run(
            pool_masses,
            (triton.cdiv(self.num_blocks, tile), self.batch * self.heads),
            (
                masses,
                chunk_masses,
                self.pooled_query,
                self.pooled_key,
                pooled,
                self.scale,
                self.num_blocks,
                self.num_rows,
                num_chunks,
                masses.stride(0),
                self.heads,
                self.kv_heads,
            ),
            {
                "HEAD_DIM": self.head_dim,
                "WIDTH": self.width,
                "BLOCK": self.block_size,
                "TILE": tile,
                "IS_RAGGED": self.is_ragged,
            },
            num_warps=4,
        )
        self.run(
            choose_patterns,
            (self.batch * self.heads,),
            (
                pooled,
                self.query_peak,
                self.key_peak,
                self.value_peak,
                self.profiles,
                self.patterns,
                self.scale,
                self.config.tau,
                (self.length - self.num_rows) // self.block_size,
                self.num_blocks,
                self.heads,
                self.kv_heads,
            ),
            {
                "HEAD_DIM": self.head_dim,
                "NUM_BLOCKS": triton.next_power_of_2(self.num_blocks),
                "IS_RAGGED": self.is_ragged,
                "HAS_VALUE": value is not None,
            },
            num_warps=max(1, min(8, self.num_blocks // 128)),
        )

    def select(self, width: int) -> BlockTables:
        """Choose and pack, a number of heads at a time."""
        tables = self._create_tables(width)
        num_heads = self.batch * self.heads
        at_once = min(num_heads, max(1, MAPS_AT_ONCE_BYTES // (4 * self.num_blocks**2)))
        has_maps = self.config.tau > 0
        maps = self.profiles.new_empty(at_once if has_maps else 0, self.num_blocks, self.num_blocks)
        thresholds = self.profiles.new_empty(num_heads, 2)
        last_ties = self.patterns.new_empty(num_heads, 2)
        for first in range(0, num_heads, at_once):
            self._select_heads(first, min(at_once, num_heads - first), maps, thresholds, last_ties, tables)
        return tables

    def select_by_row(self, scores: Tensor, width: int) -> BlockTables:
        """Choose and pack the blocks with which each row of the scores reaches gamma."""
        tables = self._create_tables(width)
        self._pack(0, self.batch * self.heads, scores, self.profiles, self.patterns, tables, by_row=True)
        return tables

    def _create_tables(self, width: int) -> BlockTables:
        counts = (self.batch, self.heads, self.num_blocks)
        return BlockTables(
            *(self.query.new_empty(shape, dtype=torch.int32) for shape in (counts, (*counts, width)) * 2)
        )

    def _select_heads(
        self, first: int, count: int, maps: Tensor, thresholds: Tensor, last_ties: Tensor, tables: BlockTables
    ) -> None:
        config, num_blocks = self.config, self.num_blocks
        if config.tau > 0:
            tile = 64
            self.run(
                estimate_attention,
                (triton.cdiv(num_blocks, tile), count),
                (
                    self.pooled_query,
                    self.pooled_key,
                    self.patterns,
                    maps,
                    self.scale * math.log2(math.e),
                    first,
                    num_blocks,
                    self.heads,
                    self.kv_heads,
                ),
                {
                    "HEAD_DIM": self.head_dim,
                    "WIDTH": self.width,
                    "TILE": tile,
                },
                num_warps=4,
                num_stages=1,
            )
        is_small = num_blocks <= MOST_BLOCKS_SMALL
        columns = min(triton.next_power_of_2(num_blocks), 4096)
        is_dense = min(config.gammas) == 1
        if not is_dense:
            self.run(
                find_thresholds,
                (2, count),
                (
                    self.profiles,
                    maps,
                    self.patterns,
                    thresholds,
                    last_ties,
                    self.gammas,
                    config.gammas[0],
                    first,
                    num_blocks,
                    self.heads,
                ),
                {
                    "TILE_ROWS": min(columns, 4096 // columns) if is_small else 1,
                    "TILE_COLUMNS": columns,
                    "SECTIONS": 8,
                    "HAS_MAPS": is_small and config.tau > 0,
                    "HAS_GAMMAS": self.has_gammas,
                },
                num_warps=16 if is_small else max(4, columns // 256),
            )
        if not is_dense and config.tau > 0 and not is_small:
            self._narrow_maps(first, count, maps, thresholds, last_ties)
        self._pack(first, count, maps, thresholds, last_ties, tables)

    def _narrow_maps(self, first: int, count: int, maps: Tensor, thresholds: Tensor, last_ties: Tensor) -> None:
        """Find the thresholds of large maps, in as many turns as their bits can need."""
        sections, chunks = 32, 32
        # Were every entry smaller, all of them together could be left out.
        smallest = 1.998 * (1 - max(self.config.gammas)) / (self.num_blocks + 1)
        (lowest,) = struct.unpack("i", struct.pack("f", smallest))
        span, num_turns = ABOVE_ONE.value - lowest, 0
        while span > 1:
            span = -(-span // (sections + 1))
            num_turns += 1
        brackets = self.patterns.new_empty(num_turns, count, 2)
        masses = self.profiles.new_empty(num_turns, count, chunks, sections)
        for turn in range(num_turns + 1):
            self.run(
                narrow_thresholds,
                (chunks if turn < num_turns else 1, count),
                (
                    maps,
                    self.patterns,
                    brackets,
                    masses,
                    thresholds,
                    last_ties,
                    self.gammas,
                    self.config.gammas[0],
                    lowest,
                    turn,
                    num_turns,
                    first,
                    self.num_blocks,
                    self.heads,
                ),
                {
                    "TILE": min(triton.next_power_of_2(self.num_blocks), 256),
                    "CHUNKS": chunks,
                    "SECTIONS": sections,
                    "HAS_GAMMAS": self.has_gammas,
                },
                num_warps=8,
            )

    def _pack(
        self,
        first: int,
        count: int,
        maps: Tensor,
        thresholds: Tensor,
        last_ties: Tensor,
        tables: BlockTables,
        *,
        by_row: bool = False,
    ) -> None:
        config, num_blocks = self.config, self.num_blocks
        self.run(
            pack_blocks,
            (count * num_blocks,),
            (
                self.profiles,
                maps,
                self.patterns,
                thresholds,
                last_ties,
                self.key_peak,
                self.value_peak,
                self.gammas,
                config.gammas[0],
                *tables,
                first,
                num_blocks,
                self.heads,
                self.kv_heads,
                tables.full_kv_indices.shape[-1],
                count_blocks(config.min_budget, self.block_size),
                0 if config.max_budget is None else config.max_budget // self.block_size,
                max(0, self.length - config.dense_last) // self.block_size if config.dense_last else num_blocks,
            ),
            {
                "NUM_BLOCKS": triton.next_power_of_2(num_blocks),
                "BY_ROW": by_row,
                "IS_DENSE": min(config.gammas) == 1,
                "HAS_GAMMAS": self.has_gammas,
                "HAS_CEILING": config.max_budget is not None,
                "HAS_VALUE": self.value is not None,
            },
            num_warps=max(1, min(8, num_blocks // 1024)),
        )
