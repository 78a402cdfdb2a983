"""Algorithm 1 up to the budgets: the pattern of each head, and the blocks that its search selects.

pool -> representative attention -> pattern -> selection of that pattern
"""

from __future__ import annotations

import torch

from flexprefill_compile.settings.config import SparsePrefillConfig

from ...choice import Choice
from ...gammas import place_gammas
from ..inputs import EstimatorInputs
from .patterns import is_query_aware
from .query_aware import select_query_aware
from .representative import compute_representative_attention
from .vertical_slash import select_vertical_slash


def choose_flexprefill(inputs: EstimatorInputs, config: SparsePrefillConfig) -> Choice:
    """Choose the blocks of causal attention. Source: FlexPrefill, Algorithm 1."""
    gamma = place_gammas(config, inputs.query.device)
    representative = inputs.query[:, :, -config.block_size :].to(inputs.dtype)
    attention = compute_representative_attention(representative, inputs.key, inputs.scale, config.block_size)
    query_aware = is_query_aware(
        representative.mean(-2, keepdim=True), inputs.pooled_key, attention.columns, inputs.scale, config.tau
    )[..., None, None]
    estimate = select_query_aware(inputs.pooled_query, inputs.pooled_key, inputs.grid[0, 0], inputs.scale, gamma)
    extended = select_vertical_slash(attention, gamma)
    return Choice(
        selected=torch.where(query_aware, estimate[0], extended[0]),
        score=torch.where(query_aware, estimate[1], extended[1]),
        is_finite=torch.isfinite(estimate[1].sum((-2, -1)) + attention.columns.sum(-1)),
    )
