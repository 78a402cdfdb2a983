"""Triton kernels as estimators call them: None where there is no Triton, or where the kernels don't take the inputs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from flexprefill_compile.settings.config import SparsePrefillConfig

from ..attention_inputs import AttentionInputs
from ..layout import BlockTables
from ..masks.facts import MaskFacts


def share_rows(inputs: AttentionInputs, rows_per_block: int) -> Tensor | None:
    """Return what ``EstimatorInputs.share_of_rows`` does, or None."""
    if not inputs.query.is_cuda:
        return None
    try:
        from ..kernels.block_shares import shares  # noqa: PLC0415  (Triton is not on every platform)
    except ImportError:
        return None
    return shares.share_rows(inputs, rows_per_block) if shares.can_share(inputs) else None


def share_antidiagonals(inputs: AttentionInputs, stride: int) -> Tensor | None:
    """Return what ``score_antidiagonals`` does, or None."""
    if not inputs.query.is_cuda:
        return None
    try:
        from ..kernels.block_shares import shares  # noqa: PLC0415  (Triton is not on every platform)
    except ImportError:
        return None
    return shares.share_antidiagonals(inputs, stride) if shares.can_share(inputs) else None


def select_flexprefill(
    query: Tensor, key: Tensor, value: Tensor | None, scale: float, config: SparsePrefillConfig, width: int
) -> BlockTables | None:
    """Select and pack the blocks of causal attention by FlexPrefill; ``width`` is of the indices."""
    try:
        from ..kernels.flexprefill import select  # noqa: PLC0415  (Triton is not on every platform)
    except ImportError:
        return None
    return select.try_select(query, key, value, scale, config, width)


def select_pooled(
    query: Tensor, key: Tensor, value: Tensor | None, scale: float, config: SparsePrefillConfig, width: int
) -> BlockTables | None:
    """Select and pack the blocks of causal attention by pooled keys; ``width`` is of the indices."""
    try:
        from ..kernels.pooled import tables  # noqa: PLC0415  (Triton is not on every platform)
    except ImportError:
        return None
    return tables.try_select(query, key, value, scale, config, width)


def select_masked_pooled(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    facts: MaskFacts,
    scale: float,
    softcap: float | None,
    config: SparsePrefillConfig,
) -> BlockTables | None:
    """Select and pack the blocks of masked attention by pooled keys; scores have no bias."""
    try:
        from ..kernels.pooled import masked_tables  # noqa: PLC0415  (Triton is not on every platform)
    except ImportError:
        return None
    return masked_tables.try_select_masked(query, key, value, facts, scale, softcap, config)


def select_scored(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    compute_scores: Callable[[], Tensor],
    config: SparsePrefillConfig,
    width: int,
) -> BlockTables | None:
    """Select and pack by block scores, (B, H, num_blocks, num_blocks), computed only if the kernels take the inputs."""
    try:
        from ..kernels.flexprefill import select  # noqa: PLC0415  (Triton is not on every platform)
    except ImportError:
        return None
    if config.is_dense or not select.can_select(query, value, config):
        return None
    return select.try_select_scored(query, key, value, compute_scores(), config, width)
