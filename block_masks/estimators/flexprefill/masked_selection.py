"""Algorithm 1 up to the budgets, under any mask: the steps of ``causal_selection.py`` for each of its sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from flexprefill_compile.settings.config import SparsePrefillConfig

from ...choice import Choice
from ...gammas import place_gammas
from ...masks.facts import MaskFacts
from ...segments import Segments
from ..inputs import EstimatorInputs
from .masked_representative import (
    ScoreRule,
    average_rows,
    clamp_diagonals,
    compute_masked_attention,
)
from .patterns import is_masked_query_aware
from .query_aware import select_masked_query_aware
from .vertical_slash import select_masked_vertical_slash


def choose_masked_flexprefill(
    inputs: EstimatorInputs, facts: MaskFacts, rule: ScoreRule, config: SparsePrefillConfig
) -> Choice:
    """Choose by the pattern of each sequence. Source: FlexPrefill, Algorithm 1."""
    gamma = place_gammas(config, inputs.query.device)
    segments, slots = list_segments(facts), _list_slots(facts)
    attention = compute_masked_attention(inputs.query, inputs.key, facts, rule, segments, inputs.dtype)
    if rule.bias is not None:
        return Choice(*select_masked_vertical_slash(attention.pooled, slots, gamma, segments), attention.is_finite)
    rows = average_rows(inputs.query, facts.rows, inputs.dtype)
    mean_logits = rule.cap((rows * inputs.pooled_key).sum(-1).mul_(rule.scale))
    columns = attention.pooled.columns
    query_aware = is_masked_query_aware(mean_logits, attention.is_seen, columns, config.tau, segments).unsqueeze(-1)
    estimated, estimate = select_masked_query_aware(
        rule.cap((inputs.pooled_query @ inputs.pooled_key.mT).mul_(rule.scale)), inputs.grid, gamma, segments
    )
    extended, extension = select_masked_vertical_slash(attention.pooled, slots, gamma, segments)
    return Choice(
        selected=torch.where(query_aware, estimated, extended),
        score=torch.where(query_aware, estimate, extension),
        is_finite=attention.is_finite & torch.isfinite(estimate.sum((-2, -1))),
    )


def list_segments(facts: MaskFacts) -> Segments | None:
    """Return the blocks of each packed sequence, (B|1, 1, num_k_blocks); None is one sequence a row of the batch."""
    if facts.rows.shape[1] == 1:
        return None
    return Segments(facts.first_block.unsqueeze(1), facts.last_block.unsqueeze(1))


def list_candidates(facts: MaskFacts) -> Tensor:
    """Return the possible blocks that hold counted queries and keys of one sequence: those that estimates cover."""
    rows, columns = facts.query_counts.any(-1).unsqueeze(-1), facts.key_counts.any(-1).unsqueeze(-2)
    of_one_sequence = facts.first_block.unsqueeze(-1) == facts.first_block.unsqueeze(-2)
    return facts.possible & (rows & columns & of_one_sequence).unsqueeze(1)


def _list_slots(facts: MaskFacts) -> Tensor:
    """Return the slot of each block's diagonal, (B|1, num_q_blocks, num_k_blocks)."""
    num_q_blocks, num_k_blocks = facts.possible.shape[-2:]
    query_block = torch.arange(num_q_blocks, device=facts.possible.device).unsqueeze(-1)
    key_block = torch.arange(num_k_blocks, device=facts.possible.device)
    diagonal = query_block + facts.block_offset - key_block
    return clamp_diagonals(diagonal, facts.first_block.unsqueeze(-1), facts.last_block.unsqueeze(-1))
