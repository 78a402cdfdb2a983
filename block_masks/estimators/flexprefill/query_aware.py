"""Algorithm 4: block attention of every query block, estimated from pooled queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ...gammas import Share
from ...segments import Segments
from ...select import select_cumulative


def select_query_aware(
    pooled_query: Tensor, pooled_key: Tensor, causal: Tensor, scale: float, gamma: Share
) -> tuple[Tensor, Tensor]:
    """Select the fewest blocks of the whole head whose estimated attention reaches gamma.

    Args:
        pooled_query: (B, H, num_blocks, D), mean of each query block.
        pooled_key: (B, H, num_blocks, D), mean of each key block.
        causal: (num_blocks, num_blocks) bool.
        scale: Factor on the scores.
        gamma: Share to reach, one number or (H, 1).

    Returns:
        Selected blocks, (B, H, num_blocks, num_blocks) bool, and their scores for the budgets, the estimated
        attention itself. Source: FlexPrefill, Algorithm 4.
    """
    logits = (pooled_query @ pooled_key.mT) * scale
    attention = logits.masked_fill(~causal, -torch.inf).softmax(-1)
    selected = select_cumulative(attention.flatten(-2), gamma).unflatten(-1, causal.shape)
    return selected, attention


def select_masked_query_aware(
    logits: Tensor, candidates: Tensor, gamma: Share, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    """Select the fewest blocks of each sequence whose estimated attention reaches gamma.

    Args:
        logits: (B, H, num_q_blocks, num_k_blocks), scores of mean queries with mean keys; overwritten.
        candidates: (B|1, H|1, num_q_blocks, num_k_blocks) bool, the blocks that may be selected.
        gamma: Share to reach, one number or (H, 1).
        segments: The row blocks of each packed sequence; None is one sequence a row of the batch.

    Returns:
        As ``select_query_aware``.
    """
    attention = logits.masked_fill_(~candidates, -torch.inf).softmax(-1)
    # A row without candidates.
    attention = attention.masked_fill_(~candidates.any(-1, keepdim=True), 0)
    num_rows, num_columns = attention.shape[-2:]
    if segments is not None:
        first, last = segments.first * num_columns, (segments.last + 1) * num_columns - 1
        segments = Segments(first.repeat_interleave(num_columns, -1), last.repeat_interleave(num_columns, -1))
    selected: Tensor = select_cumulative(attention.flatten(-2), gamma, segments).unflatten(-1, (num_rows, num_columns))
    return selected, attention
