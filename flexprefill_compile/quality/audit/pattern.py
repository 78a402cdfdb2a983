"""Which of FlexPrefill's patterns each head of an attention call follows, and by what distance."""

from __future__ import annotations

import torch
from torch import Tensor

from flexprefill_compile.block_masks.attention_inputs import SCORES_AT_ONCE
from flexprefill_compile.block_masks.estimators.flexprefill.masked_representative import (
    average_rows,
    compute_masked_attention,
)
from flexprefill_compile.block_masks.estimators.flexprefill.masked_selection import list_segments
from flexprefill_compile.block_masks.estimators.flexprefill.patterns import measure_distance, measure_masked_distance
from flexprefill_compile.block_masks.estimators.flexprefill.representative import compute_representative_attention
from flexprefill_compile.block_masks.layout import pool_blocks, pool_counted_blocks
from flexprefill_compile.block_masks.masks.facts import MaskFacts
from flexprefill_compile.block_masks.observed_attention import ObservedAttention

from ...settings.config import SparsePrefillConfig

QUERY_AWARE = "query-aware"
VERTICAL_SLASH = "vertical-slash"
_MIXED = "mixed"


def find_patterns(call: ObservedAttention, config: SparsePrefillConfig) -> list[tuple[str, float | None]]:
    """Return the pattern of each head and its Jensen-Shannon distance, that of Algorithm 2.

    Over the sequences of a batch the distance is a mean, and heads that follow both patterns are "mixed". Other
    estimators than FlexPrefill's have no patterns: their name stands instead, and None for the distance. Waits for the
    device.
    """
    if config.estimator != "flexprefill":
        return [(str(config.estimator), None)] * call.query.shape[1]
    if call.rule.bias is not None:  # the pooled estimate knows no bias
        return [(VERTICAL_SLASH, None)] * call.query.shape[1]
    distances, weights = _measure(call, config.block_size)
    shares = ((distances < config.tau) * weights).sum((0, 2)) / weights.sum()
    means = (distances * weights).sum((0, 2)) / weights.sum()
    names = [QUERY_AWARE if share > 1 - 1e-6 else _MIXED if share > 0 else VERTICAL_SLASH for share in shares.tolist()]
    return list(zip(names, means.tolist(), strict=True))


def _measure(call: ObservedAttention, block_size: int) -> tuple[Tensor, Tensor]:
    """Return the distance of each sequence of each head, (B, H, N), and how much it counts, (B, 1, N)."""
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    group = call.query.shape[1] // call.key.shape[1]
    if call.facts is not None:
        return _measure_masked(call, call.facts, dtype, group)
    representative = call.query[:, :, -block_size:].to(dtype)
    attention = compute_representative_attention(representative, call.key, call.rule.scale, block_size)
    pooled_key = pool_blocks(call.key, block_size, dtype).repeat_interleave(group, dim=1)
    mean = representative.mean(-2, keepdim=True)
    distances = measure_distance(mean, pooled_key, attention.columns, call.rule.scale).unsqueeze(-1)
    return distances, torch.ones_like(distances[:, :1])


def _measure_masked(call: ObservedAttention, facts: MaskFacts, dtype: torch.dtype, group: int) -> tuple[Tensor, Tensor]:
    """Measure under a mask; a packed sequence counts by its blocks."""
    rule, segments = call.rule, list_segments(facts)
    at_once = SCORES_AT_ONCE[call.query.device.type]
    pooled_key = pool_counted_blocks(call.key, facts.key_counts, dtype, at_once).repeat_interleave(group, dim=1)
    mean = average_rows(call.query, facts.rows, dtype)
    logits = rule.cap((mean * pooled_key).sum(-1).mul_(rule.scale))
    attention = compute_masked_attention(call.query, call.key, facts, rule, segments, dtype)
    distances = measure_masked_distance(logits, attention.is_seen, attention.pooled.columns, segments)
    weights = facts.key_counts.any(-1).to(dtype).unsqueeze(1)
    if segments is None:
        weights = weights.amax(-1, keepdim=True)
    return distances, weights.expand(distances.shape[0], 1, distances.shape[2])
