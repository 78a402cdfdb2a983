"""The launches that read the inputs of a selection: pooling, the last queries' attention, each head's pattern.

    pool_inputs -> score_representative -> pool_masses -> choose_patterns

Launch shapes depend on the sizes alone; which heads are query-aware is decided on the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flexprefill_compile.settings.config import SparsePrefillConfig

from ...gammas import place_gammas
from ...layout import count_blocks
from ..launch import Launcher, cdiv, next_power_of_2
from .patterns import QUERY_AWARE, choose_patterns
from .representative import pool_inputs, pool_masses, score_representative

# Enough programs to fill the largest GPU of today a few times over.
SCORE_PROGRAMS = 512


class Reading:
    """What a selection takes from its inputs: the buffers that the later kernels choose by.

    Attributes:
        pooled_query: (B * H, num_blocks + 1, D) float32, the last block that of the representative queries.
        pooled_key: (B * Hkv, num_blocks, D) float32.
        query_peak: (B * H, num_blocks + 1) float32, the largest magnitude in a pooled vector; infinite where a block
            is not finite.
        key_peak: (B * Hkv, num_blocks) float32, likewise.
        value_peak: (B * Hkv, num_blocks) float32, zero, or infinite likewise.
        profiles: (B * H, 2, num_blocks) float32, the mass on columns and diagonals.
        patterns: (B * H,) int32.
        thresholds: (B * H, 2) float32, from which on columns and diagonals, or a map, reach gamma.
        last_ties: (B * H, 2) int32, the last places at which entries equal to a threshold are needed.
    """

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
        self.width = max(16, next_power_of_2(self.head_dim))

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
        self.thresholds = empty(heads, 2)
        self.last_ties = query.new_empty((heads, 2), dtype=torch.int32)
        gammas = place_gammas(config, query.device, torch.float32)
        self.has_gammas = isinstance(gammas, Tensor)
        self.gammas = gammas if isinstance(gammas, Tensor) else self.profiles  # read only if there are several

    def read_inputs(self) -> None:
        """Pool the inputs, score the representative queries, and choose each head's pattern."""
        if self.config.is_dense:
            self.patterns.zero_()  # every block
            return
        self.pool()
        self._choose_patterns(self._average(self._score()))

    def _score(self) -> tuple[Tensor, Tensor]:
        """Score the representative queries; return the masses by key block and by chunk of them."""
        query, key = self.query, self.key
        group_rows = self.heads // self.kv_heads * self.num_rows
        rows, keys, num_warps, num_stages = choose_score_tiles(
            group_rows, self.block_size, self.width, query.element_size()
        )
        row_tiles = cdiv(group_rows, rows)
        kv_heads = self.batch * self.kv_heads
        chunk_blocks = max(1, self.num_blocks * row_tiles * kv_heads // SCORE_PROGRAMS)
        num_chunks = cdiv(self.num_blocks, chunk_blocks)
        masses = query.new_empty(
            (4 if self.is_ragged else 3, kv_heads, self.num_blocks, group_rows), dtype=torch.float32
        )
        chunk_masses = query.new_empty((kv_heads, num_chunks, group_rows), dtype=torch.float32)
        self.run(
            score_representative,
            (row_tiles, num_chunks, kv_heads),
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
        return masses, chunk_masses

    def _average(self, scored: tuple[Tensor, Tensor]) -> Tensor:
        """Average the masses over the rows, beside their estimate: (B * H, 5, num_blocks)."""
        masses, chunk_masses = scored
        heads = self.batch * self.heads
        pooled = self.query.new_empty((heads, 5, self.num_blocks), dtype=torch.float32)
        tile = 16
        self.run(
            pool_masses,
            (cdiv(self.num_blocks, tile), heads),
            (
                masses,
                chunk_masses,
                self.pooled_query,
                self.pooled_key,
                pooled,
                self.scale,
                self.num_blocks,
                self.num_rows,
                chunk_masses.shape[1],
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
        return pooled

    def _choose_patterns(self, pooled: Tensor) -> None:
        """Choose each head's pattern, and the thresholds of its columns and diagonals."""
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
                self.thresholds,
                self.last_ties,
                self.gammas,
                self.config.gammas[0],
                self.scale,
                self.config.tau,
                (self.length - self.num_rows) // self.block_size,
                self.num_blocks,
                self.heads,
                self.kv_heads,
            ),
            {
                "HEAD_DIM": self.head_dim,
                "NUM_BLOCKS": next_power_of_2(self.num_blocks),
                "IS_RAGGED": self.is_ragged,
                "HAS_VALUE": self.value is not None,
                "HAS_GAMMAS": self.has_gammas,
            },
            num_warps=max(1, min(8, self.num_blocks // 128)),
        )

    def read_scores(self, scores: Tensor) -> None:
        """Choose the scores, (B, H, num_blocks, num_blocks), for heads that are finite, else every block."""
        self.pool()
        peak = self.key_peak.amax(-1) if self.value is None else (self.key_peak + self.value_peak).amax(-1)
        peak = self.query_peak.amax(-1) + peak.repeat_interleave(self.heads // self.kv_heads)
        is_finite = torch.isfinite(scores.sum((-2, -1)).view(-1)) & torch.isfinite(peak)
        self.patterns.copy_(is_finite).mul_(QUERY_AWARE.value)

    def pool(self) -> None:
        """Pool queries and keys, and find the blocks that are not finite."""
        query, key, value = self.query, self.key, self.value
        looked_at = query if value is None else value
        value_width = next_power_of_2(looked_at.shape[-1])
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


def choose_score_tiles(group_rows: int, block_size: int, width: int, element_size: int) -> tuple[int, int, int, int]:
    """Return the rows and keys of a tile of scores, its warps and its pipeline stages."""
    rows = min(64, max(16, next_power_of_2(group_rows)))
    is_narrow = width * element_size <= 256
    largest = (128 if is_narrow else 64) if element_size == 2 else max(16, 4096 // width)
    # A stage holds a whole key block.
    num_stages = max(1, min(3, 2**17 * 3 // 4 // (block_size * width * element_size)))
    return rows, min(block_size, largest), 4 if is_narrow else 8, num_stages
