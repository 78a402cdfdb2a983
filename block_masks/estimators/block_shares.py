"""Softmax of a few query vectors over all key vectors, pooled by block: the core of every scoring estimator.

    rows x columns -> softmax over the columns -> sum by key block, mean by query block

A row or a column is a token, or stands for a group of tokens. Scores are made for a few query blocks at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention_inputs import SCORES_AT_ONCE, AttentionInputs


class Rows(NamedTuple):
    """R query vectors for each query block.

    Attributes:
        take: Returns those of the blocks from one up to another: (B, H, blocks, R, D).
        num_tokens: (B|1, num_q_blocks, R) int, how many tokens each stands for; 0 is left out.
        positions: (B|1, num_q_blocks, R) int, the last query that each stands for.
    """

    take: Callable[[int, int], Tensor]
    num_tokens: Tensor
    positions: Tensor


class Columns(NamedTuple):
    """C key vectors for each key block.

    Attributes:
        vectors: (B, Hkv, num_k_blocks * C, D).
        is_counted: (B|1, num_k_blocks, C, tokens) bool, which of the tokens that a vector stands for count. A vector
            has the weight of those that do.
    """

    vectors: Tensor
    is_counted: Tensor


def compute_block_shares(inputs: AttentionInputs, rows: Rows, columns: Columns, scale: float) -> Tensor:
    """Return the mean attention of each query block's rows on each key block.

    Returns:
        (B, H, num_q_blocks, num_k_blocks), zero off the grid.
    """
    batch, heads, num_q_blocks, num_k_blocks = inputs.shape
    num_rows, num_columns = rows.num_tokens.shape[-1], columns.is_counted.shape[2]
    weights = rows.num_tokens.to(inputs.dtype)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
    shares = weights.new_zeros(inputs.shape)
    a_block = batch * heads * num_rows * num_k_blocks * num_columns
    at_once = max(1, SCORES_AT_ONCE[shares.device.type] // a_block)
    visibility = _Visibility(inputs, rows, columns)
    for first in range(0, num_q_blocks, at_once):
        last = min(first + at_once, num_q_blocks)
        reach = last if inputs.facts is None else num_k_blocks
        queries = (rows.take(first, last).to(inputs.dtype) * scale).to(columns.vectors.dtype)
        queries = queries.reshape(batch, columns.vectors.shape[1], -1, queries.shape[-1])
        scores = queries @ columns.vectors[:, :, : reach * num_columns].mT
        scores = inputs.cap(scores).view(batch, heads, last - first, num_rows, reach, num_columns)
        visibility.hide(scores, first, last)
        mass = scores.flatten(-2).softmax(-1, dtype=inputs.dtype).view_as(scores).sum(-1)
        shares[:, :, first:last, :reach] = (mass * weights[:, None, first:last, :, None]).sum(-2)
    return shares.masked_fill_(~inputs.grid, 0)


class _Visibility:
    """Which rows see which columns."""

    def __init__(self, inputs: AttentionInputs, rows: Rows, columns: Columns) -> None:
        self.grid, self.facts = inputs.grid, inputs.facts
        num_blocks, num_columns, tokens = columns.is_counted.shape[1:]
        starts = torch.arange(0, num_blocks * num_columns * tokens, tokens, device=self.grid.device)
        self.starts = starts.view(num_blocks, num_columns)
        self.positions = rows.positions if self.facts is None else rows.positions + self.facts.offset
        num_tokens = columns.is_counted.sum(-1)
        self.is_empty = num_tokens == 0
        # A column that stands for fewer tokens than others weighs less.
        self.log_weights = None if tokens == 1 else (num_tokens.clamp(min=1) / tokens).to(inputs.product_dtype).log()

    def hide(self, scores: Tensor, first: int, last: int) -> None:
        """Lower the scores of hidden columns, in place; scores are (B, H, blocks, R, reach, C) of blocks from first on.

        A finite lowest score rather than -inf: a row that sees nothing, and has no weight, must not become NaN.
        """
        # Under plain causality, all of the blocks before the diagonal are seen.
        unsure = slice(first if self.facts is None else 0, scores.shape[-2])
        scores = scores[..., unsure, :]
        if self.log_weights is not None:
            scores += self.log_weights[:, None, None, None, unsure]
        visible = self.starts[unsure] <= self.positions[:, None, first:last, :, None, None]
        if self.facts is not None:
            certain, grid = (x[:, :, first:last, None, :, None] for x in (self.facts.certain, self.grid))
            visible = (visible | certain) & grid & ~self.is_empty[:, None, None, None]
        scores.masked_fill_(~visible, torch.finfo(scores.dtype).min)
