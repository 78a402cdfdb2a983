"""Algorithm 4: block attention of every query block, estimated from pooled queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from flexprefill_compile.block_masks.select import select_cumulative


def select_query_aware(
    pooled_query: Tensor, pooled_key: Tensor, causal: Tensor, scale: float, gamma: float
) -> tuple[Tensor, Tensor]:
    """Select the fewest blocks of the whole head whose estimated attention reaches gamma.

    Args:
        pooled_query: (B, H, num_blocks, D), mean of each query block.
        pooled_key: (B, H, num_blocks, D), mean of each key block.
        causal: (num_blocks, num_blocks) bool.
        scale: Factor on the scores.
        gamma: Share to reach.

    Returns:
        Selected blocks, (B, H, num_blocks, num_blocks) bool, and their scores for the budgets, the estimated
        attention itself. Source: FlexPrefill, Algorithm 4.
    """
    logits = (pooled_query @ pooled_key.mT) * scale
    attention = logits.masked_fill(~causal, -torch.inf).softmax(-1)
    selected = select_cumulative(attention.flatten(-2), gamma).unflatten(-1, causal.shape)
    return selected, attention
