"""Exact rows and antidiagonals, averaged: each finds what the other misses.

One query in 8 attends to all keys, exactly: that finds sharp attention to single keys, as long as the query is typical
of its neighbours. The other half sums scores along the antidiagonals of tiles: every query and every key takes part,
but the sum blurs single keys.
"""

from __future__ import annotations

from torch import Tensor

from .inputs import EstimatorInputs
from .xattention import score_antidiagonals

# On SmolLM2 more rows, or smaller tiles, gain nothing; fewer rows lose: benchmarks/auto_variants.py.
_TOKENS_PER_ROW = 8
_STRIDE = 16


def score_auto(inputs: EstimatorInputs) -> Tensor:
    """Return the mean of both distributions, (B, H, num_q_blocks, num_k_blocks)."""
    rows = inputs.share_of_rows(inputs.block_size // _TOKENS_PER_ROW)
    return rows.add_(score_antidiagonals(inputs, _STRIDE)).div_(2)
