"""From queries and keys to the blocks of causal attention to compute: the kernel of the op ``select_blocks``.

    estimator -> heads that are not finite, rows that stay dense -> budgets -> pack

Everything is batched over prompts and heads. No GPU sync.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexprefill_compile.ops import SELECT_BLOCKS, index_width
from flexprefill_compile.settings.config import SparsePrefillConfig, check_config
from flexprefill_compile.settings.device_defaults import resolve_selection

from .estimators.inputs import EstimatorInputs
from .estimators.table import find_row
from .gammas import place_gammas, take_all_of_dense_heads
from .layout import BlockTables, count_blocks, create_causal_grid, pack_causal_blocks
from .recording import record
from .select import apply_budget, first_dense_block


def create_prefill_block_mask(
    query: Tensor, key: Tensor, config: SparsePrefillConfig = SparsePrefillConfig(), *, scale: float | None = None
) -> BlockMask:
    """Select the blocks of one causal prefill, as a BlockMask for a compiled ``flex_attention``.

    The mask holds no transposed tables, so it serves the forward pass only. Uncompiled, ``flex_attention`` ignores
    the selection, computes dense causal attention, and the mask warns of it.

    Args:
        query: (B, H, S, D), floating point.
        key: (B, Hkv, S, D), of the same dtype and device; H is a multiple of Hkv.
        config: What to select; ``min_length`` and ``on_skip`` play no part here, and blocks are 128 unless given.
        scale: Factor on the scores, 1 / sqrt(D) by default.

    Raises:
        ValueError: The shapes, dtypes or devices don't fit, or ``config`` is no ``SparsePrefillConfig``.
    """
    check_config(config)
    _check_query_and_key(query, key)
    config = resolve_selection(config, ["block_size"], query.device)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    length = query.shape[-2]
    num_blocks = count_blocks(length, config.block_size)
    tables = select_prefill_tables(query, key, None, scale, config, num_blocks)
    return create_block_mask(tables, length, length, config.block_size, kind=_SelectedBlocks)


class _SelectedBlocks(BlockMask):
    """A BlockMask whose tables leave out what its mask_mod allows, which uncompiled ``flex_attention`` can't see."""

    def as_tuple(self, flatten: Any = True) -> Any:
        """Return what ``flex_attention`` takes; warn if it is not compiled, for it reads the mask_mod alone."""
        if not torch.compiler.is_compiling():
            warnings.warn(
                "flex_attention is not compiled: it ignores the selected blocks and computes dense causal attention. "
                "Call torch.compile(flex_attention)",
                stacklevel=3,
            )
        return super().as_tuple(flatten)


def create_block_mask(
    tables: BlockTables, query_length: int, key_length: int, block_size: int, kind: type[BlockMask] = BlockMask
) -> BlockMask:
    """Wrap packed tables as a BlockMask, or a kind of it, with a causal mask_mod."""
    return kind.from_kv_blocks(
        *tables,
        BLOCK_SIZE=block_size,
        mask_mod=causal_mask,
        seq_lengths=(query_length, key_length),
        compute_q_blocks=False,
    )


def causal_mask(batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
    """FlexAttention's mask_mod of causal attention."""
    return query_index >= key_index


def _check_query_and_key(query: Tensor, key: Tensor) -> None:
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


def select_prefill_tables(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    scale: float,
    config: SparsePrefillConfig,
    width: int,
) -> BlockTables:
    """Select and pack the blocks of causal attention, on a GPU by Triton kernels where they take the inputs."""
    select_by_kernels = find_row(config).select_by_kernels
    if query.is_cuda and select_by_kernels is not None:
        tables = select_by_kernels(query, key, value, scale, config, width)
        if tables is not None:
            return tables
    return pack_causal_blocks(select_prefill_blocks(query, key, value, scale, config), width)


def select_prefill_blocks(
    query: Tensor, key: Tensor, value: Tensor | None, scale: float, config: SparsePrefillConfig
) -> Tensor:
    """Select the blocks of causal attention to compute.

    A head whose inputs or scores are not all finite gets every causal block, so that NaN and inf reach the same rows
    as in dense attention. Under ``max_budget`` the blocks whose keys or values are not finite come first.

    Memory peaks at about 40 bytes for each block of the grid, (B, H, num_blocks, num_blocks), most of it for sorting,
    or at what the estimator needs, if that is more. No tensor has S x S elements.

    Args:
        query: (B, H, S, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv), read for its NaN and inf only; None skips that check.
        scale: Factor on the scores.
        config: What to select.

    Returns:
        (B, H, num_blocks, num_blocks) bool, causal, rows are query blocks.
    """
    batch, heads, length, _ = query.shape
    block_size = config.block_size
    num_blocks = count_blocks(length, block_size)
    causal = create_causal_grid(num_blocks, query.device)
    if config.is_dense:
        return causal.expand(batch, heads, -1, -1)

    inputs = EstimatorInputs(query, key, scale, block_size, causal.expand(1, 1, -1, -1))
    choice = find_row(config).choose(inputs, config)
    selected = take_all_of_dense_heads(place_gammas(config, query.device), choice.selected, causal)
    if config.dense_last:
        block = torch.arange(num_blocks, device=query.device).unsqueeze(-1)
        selected = selected | (block >= first_dense_block(length, config))
    block_is_finite = torch.isfinite(inputs.pooled_key.sum(-1))
    is_finite = block_is_finite.all(-1) & choice.is_finite & torch.isfinite(inputs.pooled_query.sum((-2, -1)))
    if value is not None:
        value_is_finite = torch.isfinite(_largest_by_block(value, block_size))
        value_is_finite = value_is_finite.repeat_interleave(heads // key.shape[1], dim=1)
        block_is_finite = block_is_finite & value_is_finite
        is_finite = is_finite & value_is_finite.all(-1)
    keeps = is_finite[..., None, None]
    return apply_budget(
        torch.where(keeps, selected, causal),
        torch.where(keeps, choice.score, (~block_is_finite).to(inputs.dtype).unsqueeze(-2)),
        causal,
        min_blocks=count_blocks(config.floor_at(length), block_size),
        max_blocks=None if config.max_budget is None else config.max_budget // block_size,
    )


def _largest_by_block(x: Tensor, block_size: int) -> Tensor:
    """Return the largest magnitude in each block of tokens, NaN where there is one: (B, H, S, D) to (B, H, N)."""
    whole = x.shape[-2] // block_size * block_size
    blocks: Tensor = x[..., :whole, :].unflatten(-2, (-1, block_size))
    largest: Tensor = torch.linalg.vector_norm(blocks, torch.inf, dim=(-2, -1))
    if whole == x.shape[-2]:
        return largest
    rest = torch.linalg.vector_norm(x[..., whole:, :], torch.inf, dim=(-2, -1), keepdim=True).squeeze(-1)
    return torch.cat([largest, rest], dim=-1)


def _select_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    scale: float,
    *selection: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    config = SparsePrefillConfig.from_selection(*selection)
    num_blocks = count_blocks(query.shape[-2], config.block_size)
    width = index_width(num_blocks, config.block_size, config.max_budget, query.device.type)
    tables = select_prefill_tables(query, key, value, scale, config, width)
    record(tables)
    return tables


torch.library.impl(SELECT_BLOCKS, ("CPU", "CUDA"), _select_blocks)
