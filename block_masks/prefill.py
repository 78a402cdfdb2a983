"""Algorithm 1, from queries and keys to the blocks to compute: the kernel of the op ``flexprefill::select_blocks``.

    pool -> representative attention -> pattern -> selection of that pattern -> budgets -> pack

Everything is batched over prompts and heads, and nothing waits for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexprefill_compile.block_masks.layout import (
    BlockTables,
    count_blocks,
    create_causal_grid,
    pack_causal_blocks,
    pool_blocks,
)
from flexprefill_compile.block_masks.patterns import is_query_aware
from flexprefill_compile.block_masks.query_aware import select_query_aware
from flexprefill_compile.block_masks.recording import record
from flexprefill_compile.block_masks.representative import compute_representative_attention
from flexprefill_compile.block_masks.select import apply_budget
from flexprefill_compile.block_masks.vertical_slash import select_vertical_slash
from flexprefill_compile.config import SparsePrefillConfig
from flexprefill_compile.ops import SELECT_BLOCKS


def create_prefill_block_mask(
    query: Tensor, key: Tensor, config: SparsePrefillConfig = SparsePrefillConfig(), *, scale: float | None = None
) -> BlockMask:
    """Select the blocks of one causal prefill, as a BlockMask for a compiled ``flex_attention``.

    The mask holds no transposed tables, so it serves the forward pass only. Uncompiled, ``flex_attention`` ignores
    the selection and computes dense causal attention.

    Args:
        query: (B, H, S, D), floating point.
        key: (B, Hkv, S, D), of the same dtype and device; H is a multiple of Hkv.
        config: What to select; ``min_length`` and ``on_skip`` play no part here.
        scale: Factor on the scores, 1 / sqrt(D) by default.

    Raises:
        ValueError: The shapes, dtypes or devices don't fit.
    """
    check_query_and_key(query, key)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    selected = select_prefill_blocks(query, key, None, scale, config)
    return create_block_mask(pack_causal_blocks(selected), *(query.shape[-2],) * 2, config.block_size)


def create_block_mask(tables: BlockTables, query_length: int, key_length: int, block_size: int) -> BlockMask:
    """Wrap packed tables as a BlockMask, that of a causal prefill as far as its mask_mod goes."""
    return BlockMask.from_kv_blocks(
        *tables,
        BLOCK_SIZE=block_size,
        mask_mod=causal_mask,
        seq_lengths=(query_length, key_length),
        compute_q_blocks=False,
    )


def causal_mask(batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
    """FlexAttention's mask_mod of causal attention."""
    return query_index >= key_index


def check_query_and_key(query: Tensor, key: Tensor) -> None:
    """Check what ``create_prefill_block_mask`` takes.

    Raises:
        ValueError: The shapes, dtypes or devices don't fit.
    """
    if query.dim() != 4 or key.dim() != 4:
        raise ValueError(
            f"query and key must be (batch, heads, length, head_dim), got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if (query.shape[0], *query.shape[2:]) != (key.shape[0], *key.shape[2:]):
        raise ValueError(
            "query and key must have the same batch, length and head_dim, "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if 0 in query.shape or 0 in key.shape:
        raise ValueError(f"query and key must not be empty, got {tuple(query.shape)} and {tuple(key.shape)}")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"query heads must be a multiple of key heads, got {query.shape[1]} and {key.shape[1]}")
    if not query.is_floating_point() or query.dtype != key.dtype:
        raise ValueError(f"query and key must have one floating point dtype, got {query.dtype} and {key.dtype}")
    if query.device != key.device or query.device.type not in ("cpu", "cuda"):
        raise ValueError(f"query and key must be on one device, cpu or cuda, got {query.device} and {key.device}")


def select_prefill_blocks(
    query: Tensor, key: Tensor, value: Tensor | None, scale: float, config: SparsePrefillConfig
) -> Tensor:
    """Select the blocks of causal attention to compute.

    A head whose inputs or scores are not all finite gets every causal block, so that NaN and inf reach the rows
    they reach in dense attention.

    Memory peaks at about 40 bytes for each block of the grid, (B, H, num_blocks, num_blocks), most of it for the sort
    of Algorithm 4, or at what ``compute_representative_attention`` needs, if that is more; nothing has S x S elements.

    Args:
        query: (B, H, S, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv), read for its NaN and inf only; None is not to look.
        scale: Factor on the scores.
        config: What to select.

    Returns:
        (B, H, num_blocks, num_blocks) bool, causal, rows are query blocks. Source: FlexPrefill, Algorithm 1.
    """
    batch, heads, length, _ = query.shape
    block_size = config.block_size
    num_blocks = count_blocks(length, block_size)
    causal = create_causal_grid(num_blocks, query.device)
    if config.gamma == 1 and config.max_budget is None:
        return causal.expand(batch, heads, -1, -1)

    group = heads // key.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    pooled_query = pool_blocks(query, block_size, dtype)
    pooled_key = pool_blocks(key, block_size, dtype).repeat_interleave(group, dim=1)
    representative = query[:, :, -block_size:].to(dtype)
    attention = compute_representative_attention(representative, key, scale, block_size)

    query_aware = is_query_aware(
        representative.mean(-2, keepdim=True), pooled_key, attention.columns, scale, config.tau
    )[..., None, None]
    estimate = select_query_aware(pooled_query, pooled_key, causal, scale, config.gamma)
    extended = select_vertical_slash(attention, config.gamma)
    # gamma = 1 is every block, even one whose mass underflows for the representative queries.
    selected = causal if config.gamma == 1 else torch.where(query_aware, estimate[0], extended[0])
    score = torch.where(query_aware, estimate[1], extended[1])
    selected = apply_budget(
        selected,
        score,
        causal,
        min_blocks=count_blocks(config.min_budget, block_size),
        max_blocks=None if config.max_budget is None else config.max_budget // block_size,
    )
    is_finite = torch.isfinite(
        pooled_query.sum((-2, -1)) + pooled_key.sum((-2, -1)) + estimate[1].sum((-2, -1)) + attention.columns.sum(-1)
    )
    if value is not None:
        largest = torch.linalg.vector_norm(value, torch.inf, dim=(-2, -1))
        is_finite &= torch.isfinite(largest).repeat_interleave(group, dim=1)
    return torch.where(is_finite[..., None, None], selected, causal)


def _select_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    scale: float,
    gamma: float,
    tau: float,
    min_budget: int,
    max_budget: int | None,
    block_size: int,
    estimator: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    config = SparsePrefillConfig(
        gamma=gamma,
        tau=tau,
        min_budget=min_budget,
        max_budget=max_budget,
        block_size=block_size,
        estimator=estimator,
    )
    tables = pack_causal_blocks(select_prefill_blocks(query, key, value, scale, config))
    record(tables)
    return tables


torch.library.impl(SELECT_BLOCKS, ("CPU", "CUDA"), _select_blocks)
