"""Block selection under any mask: the kernel of the op ``flexprefill::select_masked_blocks``.

The steps are those of ``prefill.py``, for each sequence that the mask holds. ``masks/facts.py`` says what a sequence
is and which tokens count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexprefill_compile.ops import SELECT_MASKED_BLOCKS, define_select_masked_blocks
from flexprefill_compile.settings.config import SparsePrefillConfig

from .estimators.flexprefill.masked_representative import ScoreRule
from .estimators.flexprefill.masked_selection import list_candidates
from .estimators.inputs import EstimatorInputs
from .estimators.table import find_row
from .gammas import place_gammas, take_all_of_dense_heads
from .layout import BlockTables, count_blocks, pack_masked_blocks
from .masks.facts import MaskFacts
from .recording import record
from .select import bound_rows


def select_masked_prefill_tables(
    query: Tensor, key: Tensor, value: Tensor | None, facts: MaskFacts, rule: ScoreRule, config: SparsePrefillConfig
) -> BlockTables:
    """Select and pack the blocks of masked attention, on a GPU by Triton kernels where they take the inputs."""
    select_by_kernels = find_row(config).select_masked_by_kernels
    if query.is_cuda and select_by_kernels is not None and rule.bias is None:
        tables = select_by_kernels(query, key, value, facts, rule.scale, rule.softcap, config)
        if tables is not None:
            return tables
    return pack_masked_blocks(select_masked_prefill_blocks(query, key, value, facts, rule, config), facts.certain)


def select_masked_prefill_blocks(
    query: Tensor, key: Tensor, value: Tensor | None, facts: MaskFacts, rule: ScoreRule, config: SparsePrefillConfig
) -> Tensor:
    """Select the blocks of masked attention to compute.

    A head whose inputs or scores are not all finite gets every possible block, padding included: dense attention
    multiplies masked values by zero, and NaN times zero is NaN. With a bias every head of every estimator that reads
    queries and keys is vertical-slash: the bias is known for the representative queries only.

    Memory peaks at about 40 bytes for each block of the grid, or 70 where prompts are packed, because the sort of
    Algorithm 4 then takes two passes; or at what the estimator needs. No tensor has Q x K elements.

    Args:
        query: (B, H, Q, D).
        key: (B, Hkv, K, D).
        value: (B, Hkv, K, Dv), read for its NaN and inf only; None skips that check.
        facts: Of the mask.
        rule: From q.k to scores.
        config: What to select.

    Returns:
        (B, H, num_q_blocks, num_k_blocks) bool, possible blocks only.
    """
    batch, heads = query.shape[:2]
    possible = facts.possible.expand(batch, heads, -1, -1)
    if config.is_dense:
        return possible

    candidates = list_candidates(facts)
    optional = candidates & ~facts.required
    inputs = EstimatorInputs(query, key, rule.scale, config.block_size, candidates, facts, rule.softcap)
    choice = find_row(config).choose_masked(inputs, facts, rule, config)
    selected = take_all_of_dense_heads(place_gammas(config, query.device), choice.selected, optional)
    if config.dense_last:
        selected = selected | _find_dense_rows(facts, config).unsqueeze(-1)
    is_finite = choice.is_finite & torch.isfinite(inputs.pooled_query.sum((-2, -1)) + inputs.pooled_key.sum((-2, -1)))
    if value is not None:
        largest = torch.linalg.vector_norm(value, torch.inf, dim=(-2, -1))
        is_finite &= torch.isfinite(largest).repeat_interleave(heads // key.shape[1], dim=1)

    selected = bound_rows(
        selected,
        choice.score,
        optional,
        min_blocks=count_blocks(config.floor_at(key.shape[2]), config.block_size),
        max_blocks=None if config.max_budget is None else config.max_budget // config.block_size,
    )
    return torch.where(is_finite[..., None, None], selected | facts.required, possible)


def _find_dense_rows(facts: MaskFacts, config: SparsePrefillConfig) -> Tensor:
    """Return which query blocks hold any of the last ``dense_last`` queries of a sequence, (B|1, 1, num_q_blocks)."""
    last_row = facts.rows[..., 0]
    block = torch.arange(facts.query_counts.shape[1], device=last_row.device)
    return ((block + 1) * config.block_size > last_row - config.dense_last + 1).unsqueeze(1)


def _select_masked_blocks(
    query: Tensor, key: Tensor, value: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_facts = len(MaskFacts._fields)
    facts = MaskFacts(*arguments[:num_facts])
    score_bias, scale, softcap, *selection = arguments[num_facts:]
    config = SparsePrefillConfig.from_selection(*selection)
    rule = ScoreRule(scale, softcap, score_bias)
    tables = select_masked_prefill_tables(query, key, value, facts, rule, config)
    record(tables, facts.possible)
    return tables


define_select_masked_blocks(MaskFacts._fields)
torch.library.impl(SELECT_MASKED_BLOCKS, ("CPU", "CUDA"), _select_masked_blocks)
