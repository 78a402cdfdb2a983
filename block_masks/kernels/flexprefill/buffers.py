"""What the kernels of one selection share: its inputs, its sizes, and the tensors that they leave for each other."""

from __future__ import annotations

import torch
from torch import Tensor

from flexprefill_compile.settings.config import SparsePrefillConfig

from ...gammas import place_gammas
from ...layout import count_blocks
from ..launch import Launcher, next_power_of_2

_QUERY_STRIDES = ("query_batch", "query_head", "query_token", "query_feature")
_KEY_STRIDES = ("key_batch", "key_head", "key_token", "key_feature")


class SelectionBuffers:
    """The inputs and sizes of one selection, and its buffers.

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
        query_strides: The strides of the query by the names of the kernels' arguments.
        key_strides: Those of the key, likewise.
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
        self.query_strides = dict(zip(_QUERY_STRIDES, layouts[0][1], strict=True))
        self.key_strides = dict(zip(_KEY_STRIDES, layouts[1][1], strict=True))
        self._measure()
        self._allocate()

    def _measure(self) -> None:
        self.batch, self.heads, self.length, self.head_dim = self.query.shape
        self.kv_heads = self.key.shape[1]
        self.block_size = self.config.block_size
        self.num_blocks = count_blocks(self.length, self.block_size)
        self.num_rows = min(self.length, self.block_size)
        self.is_ragged = (self.length - self.num_rows) % self.block_size != 0
        self.width = max(16, next_power_of_2(self.head_dim))

    def _allocate(self) -> None:
        query, heads, kv_heads = self.query, self.batch * self.heads, self.batch * self.kv_heads

        def empty(*shape: int) -> Tensor:
            return query.new_empty(shape, dtype=torch.float32)

        self.pooled_query = empty(heads, self.num_blocks + 1, self.head_dim)
        self.pooled_key = empty(kv_heads, self.num_blocks, self.head_dim)
        self.query_peak = empty(heads, self.num_blocks + 1)
        self.key_peak = empty(kv_heads, self.num_blocks)
        self.value_peak = empty(kv_heads, self.num_blocks)
        self.profiles = empty(heads, 2, self.num_blocks)
        self.patterns = query.new_empty(heads, dtype=torch.int32)
        self.thresholds = empty(heads, 2)
        self.last_ties = query.new_empty((heads, 2), dtype=torch.int32)
        gammas = place_gammas(self.config, query.device, torch.float32)
        self.has_gammas = isinstance(gammas, Tensor)
        self.gammas = gammas if isinstance(gammas, Tensor) else self.profiles  # read only if there are several
