"""What an estimator may look at: queries and keys, their pools, and attention of a few rows, with or without a mask."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from ..layout import count_blocks, pool_blocks, pool_counted_blocks, take_blocks
from ..masks.facts import MaskFacts
from .block_shares import Columns, Rows, compute_block_shares
from .flexprefill.representative import SCORES_AT_ONCE
from .fused_shares import try_share_rows


@dataclasses.dataclass(frozen=True, eq=False)
class EstimatorInputs:
    """The inputs of one attention call.

    Tokens that a mask hides from all, padding, *count* for nothing: pools leave them out, and no row looks at them.

    Attributes:
        query: (B, H, Q, D).
        key: (B, Hkv, K, D); H is a multiple of Hkv.
        scale: Factor on q.k.
        block_size: Tokens a block, of queries and of keys.
        grid: (B|1, H|1, num_q_blocks, num_k_blocks) bool, the blocks to score. Others are not there for attention, or
            are computed in any case.
        facts: Of the mask; None is causal attention of a prompt to itself.
        softcap: Scores are softcap * tanh(scale * q.k / softcap); None is scale * q.k.
    """

    query: Tensor
    key: Tensor
    scale: float
    block_size: int
    grid: Tensor
    facts: MaskFacts | None = None
    softcap: float | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of block scores: (B, H, num_q_blocks, num_k_blocks)."""
        return (*self.query.shape[:2], *self.grid.shape[-2:])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of pools and shares: float32, or float64 for float64."""
        return torch.promote_types(self.query.dtype, torch.float32)

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype in which vectors are multiplied: on a GPU their own, for its matrix units."""
        return self.query.dtype if self.query.is_cuda else self.dtype

    @functools.cached_property
    def pooled_query(self) -> Tensor:
        """(B, H, num_q_blocks, D), the mean of each query block."""
        return self._pool(self.query, self._given_query_counts, self.block_size)

    @functools.cached_property
    def pooled_key(self) -> Tensor:
        """(B, H, num_k_blocks, D), the mean of each key block, repeated for the query heads that share it."""
        pooled = self._pool(self.key, self._given_key_counts, self.block_size)
        return pooled.repeat_interleave(self.query.shape[1] // self.key.shape[1], dim=1)

    @functools.cached_property
    def query_counts(self) -> Tensor:
        """(B|1, num_q_blocks, block_size) bool, the queries that count."""
        return self._inside(self.query) if self.facts is None else self.facts.query_counts

    @functools.cached_property
    def key_counts(self) -> Tensor:
        """(B|1, num_k_blocks, block_size) bool, the keys that count."""
        return self._inside(self.key) if self.facts is None else self.facts.key_counts

    def cap(self, scores: Tensor) -> Tensor:
        """Apply the softcap, in place, to scores that are scaled."""
        return scores if self.softcap is None else scores.div_(self.softcap).tanh_().mul_(self.softcap)

    def share_of_rows(self, rows_per_block: int) -> Tensor:
        """Return the exact attention of a few queries of each block, the middle ones of as many groups of its tokens.

        Memory peaks at a few tensors of ``SCORES_AT_ONCE`` numbers, or of the scores of one block of queries.

        Args:
            rows_per_block: A divisor of the block size.

        Returns:
            (B, H, num_q_blocks, num_k_blocks), the mean over the rows of their attention on each key block. Sums to 1
            over the grid's blocks, and to 0 where no query of a block counts.
        """
        shares = try_share_rows(self, rows_per_block)
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

    def end_of_groups(self, tokens: int) -> Tensor:
        """Return the last query of each group of a block, (1, num_q_blocks, groups)."""
        ends = torch.arange(tokens - 1, self.grid.shape[-2] * self.block_size, tokens, device=self.grid.device)
        return ends.clamp(max=self.query.shape[2] - 1).view(1, self.grid.shape[-2], -1)

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

    def _inside(self, x: Tensor) -> Tensor:
        num_blocks = count_blocks(x.shape[2], self.block_size)
        tokens = torch.arange(num_blocks * self.block_size, device=x.device)
        return (tokens < x.shape[2]).view(1, num_blocks, self.block_size)


def pad_tokens(x: Tensor, length: int) -> Tensor:
    """Append zeros to (B, H, S, D) up to a length."""
    missing = length - x.shape[2]
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x
