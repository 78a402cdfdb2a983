"""Algorithm 1 under any mask: the kernel of the op ``flexprefill::select_masked_blocks``.

The steps are those of ``prefill.py``, for each sequence that the mask holds. ``mask_facts.py`` says what a sequence is
and which tokens count.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flexprefill_compile.block_masks.layout import count_blocks, pack_blocks, pool_counted_blocks
from flexprefill_compile.block_masks.mask_facts import MaskFacts
from flexprefill_compile.block_masks.masked_representative import (
    MaskedAttention,
    ScoreRule,
    average_rows,
    clamp_diagonals,
    compute_masked_attention,
)
from flexprefill_compile.block_masks.patterns import is_masked_query_aware
from flexprefill_compile.block_masks.query_aware import select_masked_query_aware
from flexprefill_compile.block_masks.recording import record
from flexprefill_compile.block_masks.representative import SCORES_AT_ONCE
from flexprefill_compile.block_masks.runs import Runs
from flexprefill_compile.block_masks.select import bound_rows
from flexprefill_compile.block_masks.vertical_slash import select_masked_vertical_slash
from flexprefill_compile.config import SparsePrefillConfig
from flexprefill_compile.ops import SELECT_MASKED_BLOCKS


def select_masked_prefill_blocks(
    query: Tensor, key: Tensor, value: Tensor | None, facts: MaskFacts, rule: ScoreRule, config: SparsePrefillConfig
) -> Tensor:
    """Select the blocks of masked attention to compute.

    A head whose inputs or scores are not all finite gets every possible block, padding included: SDPA multiplies what
    is masked by zero, which NaN survives. With a bias every head is vertical-slash: the pooled estimate, which knows
    no bias, proves nothing.

    Memory peaks at about 40 bytes for each block of the grid, 70 where prompts are packed and the sort of Algorithm 4
    takes two passes, or at what ``compute_masked_attention`` needs; nothing has Q x K elements.

    Args:
        query: (B, H, Q, D).
        key: (B, Hkv, K, D).
        value: (B, Hkv, K, Dv), read for its NaN and inf only; None is not to look.
        facts: Of the mask.
        rule: From q.k to scores.
        config: What to select.

    Returns:
        (B, H, num_q_blocks, num_k_blocks) bool, nothing that is not possible. Source: FlexPrefill, Algorithm 1.
    """
    batch, heads = query.shape[:2]
    possible = facts.possible.expand(batch, heads, -1, -1)
    if config.gamma == 1 and config.max_budget is None:
        return possible

    means = _average(query, key, facts)
    attention = compute_masked_attention(query, key, facts, rule, list_runs(facts), means.key.dtype)
    candidates = _list_candidates(facts)
    selected, score, is_finite = _select_by_pattern(means, attention, candidates, facts, rule, config)
    is_finite &= torch.isfinite(means.query.sum((-2, -1)) + means.key.sum((-2, -1)))
    if value is not None:
        largest = torch.linalg.vector_norm(value, torch.inf, dim=(-2, -1))
        is_finite &= torch.isfinite(largest).repeat_interleave(heads // key.shape[1], dim=1)

    optional = candidates & ~facts.required
    selected = bound_rows(
        optional.expand_as(selected) if config.gamma == 1 else selected,
        score,
        optional,
        min_blocks=count_blocks(config.min_budget, config.block_size),
        max_blocks=None if config.max_budget is None else config.max_budget // config.block_size,
    )
    return torch.where(is_finite[..., None, None], selected | facts.required, possible)


class _Means(NamedTuple):
    """Means of the tokens that count, float32 or float64.

    Attributes:
        query: (B, H, num_q_blocks, D), of each query block.
        key: (B, H, num_k_blocks, D), of each key block.
        rows: (B, H, N, D), of the representative queries of each sequence.
    """

    query: Tensor
    key: Tensor
    rows: Tensor


def _average(query: Tensor, key: Tensor, facts: MaskFacts) -> _Means:
    dtype = torch.promote_types(query.dtype, torch.float32)
    at_once = SCORES_AT_ONCE[query.device.type]
    pooled_key = pool_counted_blocks(key, facts.key_counts, dtype, at_once)
    return _Means(
        query=pool_counted_blocks(query, facts.query_counts, dtype, at_once),
        key=pooled_key.repeat_interleave(query.shape[1] // key.shape[1], dim=1),
        rows=average_rows(query, facts.rows, dtype),
    )


def _select_by_pattern(
    means: _Means,
    attention: MaskedAttention,
    candidates: Tensor,
    facts: MaskFacts,
    rule: ScoreRule,
    config: SparsePrefillConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what heads select by the pattern of each sequence, how much each block matters, which heads are finite."""
    runs, slots = list_runs(facts), _list_slots(facts)
    if rule.bias is not None:
        return *select_masked_vertical_slash(attention.pooled, slots, config.gamma, runs), attention.is_finite
    mean_logits = rule.cap((means.rows * means.key).sum(-1).mul_(rule.scale))
    columns = attention.pooled.columns
    query_aware = is_masked_query_aware(mean_logits, attention.is_seen, columns, config.tau, runs).unsqueeze(-1)
    estimated, estimate = select_masked_query_aware(
        rule.cap((means.query @ means.key.mT).mul_(rule.scale)), candidates, config.gamma, runs
    )
    extended, extension = select_masked_vertical_slash(attention.pooled, slots, config.gamma, runs)
    return (
        torch.where(query_aware, estimated, extended),
        torch.where(query_aware, estimate, extension),
        attention.is_finite & torch.isfinite(estimate.sum((-2, -1))),
    )


def list_runs(facts: MaskFacts) -> Runs | None:
    """Return the blocks of each packed sequence, (B|1, 1, num_k_blocks); None is one sequence a row of the batch."""
    if facts.rows.shape[1] == 1:
        return None
    return Runs(facts.first_block.unsqueeze(1), facts.last_block.unsqueeze(1))


def _list_candidates(facts: MaskFacts) -> Tensor:
    """Return the possible blocks that the estimates speak of: counted queries and keys of one sequence."""
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


def _select_masked_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    certain: Tensor,
    possible: Tensor,
    required: Tensor,
    rows: Tensor,
    row_mask: Tensor,
    key_counts: Tensor,
    query_counts: Tensor,
    first_block: Tensor,
    last_block: Tensor,
    block_offset: Tensor,
    score_bias: Tensor | None,
    scale: float,
    softcap: float | None,
    gamma: float,
    tau: float,
    min_budget: int,
    max_budget: int | None,
    block_size: int,
    estimator: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    facts = MaskFacts(
        certain=certain,
        possible=possible,
        required=required,
        rows=rows,
        row_mask=row_mask,
        key_counts=key_counts,
        query_counts=query_counts,
        first_block=first_block,
        last_block=last_block,
        block_offset=block_offset,
    )
    config = SparsePrefillConfig(
        gamma=gamma,
        tau=tau,
        min_budget=min_budget,
        max_budget=max_budget,
        block_size=block_size,
        estimator=estimator,
    )
    rule = ScoreRule(scale, softcap, score_bias)
    tables = pack_blocks(select_masked_prefill_blocks(query, key, value, facts, rule, config), certain)
    record(tables, possible)
    return tables


torch.library.impl(SELECT_MASKED_BLOCKS, ("CPU", "CUDA"), _select_masked_blocks)
