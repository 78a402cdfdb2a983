"""Exact rows and pooled groups, averaged: what sampled queries miss the pools see, and the other way round.

A row in 16 is computed over all keys: sharp attention to single keys is found, where the row is typical of its
neighbours. The other half compares means of 16 queries with means of 16 keys: it hears every token, but blurs.
"""

from __future__ import annotations

from torch import Tensor

from flexprefill_compile.block_masks.estimator_inputs import EstimatorInputs

TOKENS_PER_GROUP = 16


def score_auto(inputs: EstimatorInputs) -> Tensor:
    """Return the mean of both distributions, (B, H, num_q_blocks, num_k_blocks)."""
    rows = inputs.share_of_rows(inputs.block_size // TOKENS_PER_GROUP)
    return rows.add_(inputs.share_of_groups(TOKENS_PER_GROUP)).div_(2)
