"""Algorithm 2: which pattern each head follows, judged by how well the pooled estimate predicts its attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.special import entr

from ...segments import Segments, logsumexp_segments, sum_segments


def is_query_aware(
    pooled_queries: Tensor, pooled_key: Tensor, true_columns: Tensor, scale: float, tau: float
) -> Tensor:
    """Tell for each head whether it is query-aware: whether its pooled estimate can be trusted.

    Args:
        pooled_queries: (B, H, 1, D), mean of the representative queries.
        pooled_key: (B, H, num_blocks, D), mean of each key block.
        true_columns: (B, H, num_blocks), the attention of the representative queries, pooled; sums to 1.
        scale: Factor on the scores.
        tau: Largest distance that is trusted.

    Returns:
        (B, H) bool: distance < tau. Source: FlexPrefill, Algorithm 2.
    """
    return measure_distance(pooled_queries, pooled_key, true_columns, scale) < tau


def measure_distance(pooled_queries: Tensor, pooled_key: Tensor, true_columns: Tensor, scale: float) -> Tensor:
    """Return how far the pooled estimate is from the true attention, arguments as in ``is_query_aware``: (B, H)."""
    estimated_columns = (pooled_queries @ pooled_key.mT * scale).softmax(-1).squeeze(-2)
    return compute_js_distance(estimated_columns, true_columns)


def is_masked_query_aware(
    logits: Tensor, is_seen: Tensor, true_columns: Tensor, tau: float, segments: Segments | None
) -> Tensor:
    """Tell the same of each sequence under a mask.

    Args:
        logits: (B, H, num_k_blocks), score of the mean representative query of a block's sequence with its mean key.
        is_seen: (B|1, H|1, num_k_blocks) bool, whether the representative queries see anything of the block.
        true_columns: (B, H, num_k_blocks), their attention; sums to 1 over the blocks of a sequence.
        tau: Largest distance that is trusted.
        segments: The blocks of each packed sequence; None is one sequence a row of the batch.

    Returns:
        (B, H, 1) bool, or (B, H, num_k_blocks) with segments.
    """
    return measure_masked_distance(logits, is_seen, true_columns, segments) < tau


def measure_masked_distance(logits: Tensor, is_seen: Tensor, true_columns: Tensor, segments: Segments | None) -> Tensor:
    """Return the distance of each sequence, arguments and shape as in ``is_masked_query_aware``."""
    logits = logits.masked_fill(~is_seen, -torch.inf)
    estimated_columns = (logits - logsumexp_segments(logits, segments)).exp().masked_fill(~is_seen, 0)
    return _compute_js_distances(estimated_columns, true_columns, segments)


def compute_js_distance(p: Tensor, q: Tensor) -> Tensor:
    """Return the square root of the Jensen-Shannon divergence in nats, in [0, sqrt(ln 2)]: (..., N) to (...)."""
    return _compute_js_distances(p, q, None).squeeze(-1)


def _compute_js_distances(p: Tensor, q: Tensor, segments: Segments | None) -> Tensor:
    """Return the distance of each segment: (..., N) to (..., 1) for one segment a row, else to (..., N).

    Written as entropies, where a bin of zero mass counts as zero instead of NaN.
    """
    divergence = (
        sum_segments(entr((p + q) / 2), segments)
        - (sum_segments(entr(p), segments) + sum_segments(entr(q), segments)) / 2
    )
    return torch.sqrt(divergence.clamp(min=0))
