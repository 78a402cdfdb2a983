"""Algorithm 2: which pattern each head follows, judged by how well the pooled estimate predicts its attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.special import entr


def is_query_aware(
    pooled_queries: Tensor, pooled_key: Tensor, true_columns: Tensor, scale: float, tau: float
) -> Tensor:
    """Tell for each head whether its cheap pooled estimate can be trusted; otherwise it is vertical-slash.

    Args:
        pooled_queries: (B, H, 1, D), mean of the representative queries.
        pooled_key: (B, H, num_blocks, D), mean of each key block.
        true_columns: (B, H, num_blocks), the attention of the representative queries, pooled; sums to 1.
        scale: Factor on the scores.
        tau: Largest distance that is trusted.

    Returns:
        (B, H) bool: distance < tau. Source: FlexPrefill, Algorithm 2.
    """
    estimated_columns = (pooled_queries @ pooled_key.mT * scale).softmax(-1).squeeze(-2)
    return compute_js_distance(estimated_columns, true_columns) < tau


def compute_js_distance(p: Tensor, q: Tensor) -> Tensor:
    """Return the square root of the Jensen-Shannon divergence in nats, in [0, sqrt(ln 2)]: (..., N) to (...).

    Written as entropies, where a bin of zero mass counts as zero instead of NaN.
    """
    divergence = entr((p + q) / 2).sum(-1) - (entr(p).sum(-1) + entr(q).sum(-1)) / 2
    return torch.sqrt(divergence.clamp(min=0))
