"""What an estimator reads: one attention call, its pooled queries and keys, and the attention of a few of its rows."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from ..attention_inputs import SCORES_AT_ONCE, AttentionInputs
from ..layout import count_blocks, pool_blocks, pool_counted_blocks, take_blocks
from .block_shares import Columns, Rows, compute_block_shares
from .kernel_calls import share_rows


@dataclasses.dataclass(frozen=True, eq=False)
class EstimatorInputs(AttentionInputs):
    """The inputs of one attention call, pooled by block on first use, and the exact attention of a few rows."""

    @functools.cached_property
    def pooled_query(self) -> Tensor:
        """(B, H, num_q_blocks, D), the mean of each query block."""
        return self._pool(self.query, self._given_query_counts, self.block_size)

    @functools.cached_property
    def pooled_key(self) -> Tensor:
        """(B, H, num_k_blocks, D), the mean of each key block, repeated for the query heads that share it."""
        pooled = self._pool(self.key, self._given_key_counts, self.block_size)
        return pooled.repeat_interleave(self.query.shape[1] // self.key.shape[1], dim=1)

    def share_of_rows(self, rows_per_block: int) -> Tensor:
        """Return the exact attention of a few queries of each block, the middle ones of as many groups of its tokens.

        Memory peaks at a few tensors of ``SCORES_AT_ONCE`` numbers, or of the scores of one block of queries.

        Args:
            rows_per_block: A divisor of the block size.

        Returns:
            (B, H, num_q_blocks, num_k_blocks), the mean over the rows of their attention on each key block. Sums to 1
            over the grid's blocks, and to 0 where no query of a block counts.
        """
        shares = share_rows(self, rows_per_block)
        if shares is not None:
            return shares
        counts = self.query_counts.unflatten(-1, (rows_per_block, -1))
        number = counts.sum(-1)
        is_middle = (counts.cumsum(-1) == (number // 2 + 1).unsqueeze(-1)) & counts
        start = torch.arange(counts[0, ..., 0].numel(), device=number.device).view(counts.shape[1:3]) * counts.shape[-1]
        positions = start + is_middle.int().argmax(-1)
        index = positions.flatten(1).clamp(max=self.query.shape[2] - 1)

        def take(first: int, last: int) -> Tensor:
            chosen = index[:, first * rows_per_block : last * rows_per_block, None].unsqueeze(1)
            rows = self.query.gather(2, chosen.expand(*self.query.shape[:2], -1, self.query.shape[3]))
            return rows.view(*rows.shape[:2], -1, rows_per_block, rows.shape[3])

        keys = take_blocks(self.key, 0, self.grid.shape[-1], self.block_size).flatten(2, 3)
        columns = Columns(keys.to(self.product_dtype), self.key_counts.unsqueeze(-1))
        return compute_block_shares(self, Rows(take, number, positions), columns, self.scale)

    @property
    def _given_query_counts(self) -> Tensor | None:
        return None if self.facts is None else self.facts.query_counts

    @property
    def _given_key_counts(self) -> Tensor | None:
        return None if self.facts is None else self.facts.key_counts

    def _pool(self, x: Tensor, counts: Tensor | None, tokens: int) -> Tensor:
        if counts is None:
            return pool_blocks(x, tokens, self.dtype)
        counts = counts.flatten(1).unflatten(1, (-1, tokens))[:, : count_blocks(x.shape[2], tokens)]
        return pool_counted_blocks(x, counts, self.dtype, SCORES_AT_ONCE[x.device.type])
