"""The selection of ``prefill.select_prefill_blocks`` on a GPU, by Triton kernels: what of it they take, and how.

    triton_reading    inputs -> what to choose by                    by the kernels of triton_representative, _patterns
    triton_choice     that, or an estimator's scores -> tables       by the kernels of triton_maps, triton_packing

Nothing waits for the device, and launch shapes depend on the sizes alone.
"""

from __future__ import annotations

import logging

import torch
import triton
from torch import Tensor

from flexprefill_compile.settings.config import SparsePrefillConfig

from ...layout import BlockTables, count_blocks
from .choice import choose_blocks, choose_blocks_by_row
from .reading import Reading

logger = logging.getLogger(__name__)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_HEAD_DIM = 256
MOST_BLOCKS = 16384  # a row of the grid is one vector of registers


def try_select(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    scale: float,
    config: SparsePrefillConfig,
    width: int,
) -> BlockTables | None:
    """Select by the kernels, or return None where they don't take the inputs or the GPU is too small for a tile."""
    if not can_select(query, value, config):
        return None
    try:
        return select_prefill_tables(query, key, value, scale, config, width)
    except triton.OutOfResources as error:
        logger.warning("blocks are selected by plain PyTorch, slower: %s", error)
        return None


def try_select_scored(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    scores: Tensor,
    config: SparsePrefillConfig,
    width: int,
) -> BlockTables | None:
    """Select by an estimator's scores, or return None where the GPU is too small for a tile."""
    try:
        return select_scored_tables(query, key, value, scores, config, width)
    except triton.OutOfResources as error:
        logger.warning("blocks are selected by plain PyTorch, slower: %s", error)
        return None


def can_select(query: Tensor, value: Tensor | None, config: SparsePrefillConfig) -> bool:
    """Tell whether the kernels take these inputs."""
    value_dim = 0 if value is None else value.shape[-1]
    return (
        query.dtype in DTYPES
        and max(query.shape[-1], value_dim) <= LARGEST_HEAD_DIM
        and count_blocks(query.shape[-2], config.block_size) <= MOST_BLOCKS
    )


def select_prefill_tables(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    scale: float,
    config: SparsePrefillConfig,
    width: int,
) -> BlockTables:
    """Select and pack the blocks of causal attention.

    The blocks are those of ``select_prefill_blocks``, but for masses within rounding of a threshold. Beside the
    result, memory peaks at the pooled query, at four numbers for each 1 / block_size of the representative scores, and
    at the maps of pooled attention, (B, H, num_blocks, num_blocks) float32 or ``MAPS_AT_ONCE_BYTES`` of
    ``triton_choice``, whichever is less, but no less than one map.

    Args:
        query: (B, H, S, D), one of ``DTYPES``, any strides.
        key: (B, Hkv, S, D), of the same dtype.
        value: (B, Hkv, S, Dv), read for its NaN and inf only; None is not to look.
        scale: Factor on the scores.
        config: What to select.
        width: Columns of the tables' indices.
    """
    with torch.cuda.device_of(query):
        reading = Reading(query, key, value, scale, config)
        reading.read_inputs()
        return choose_blocks(reading, width)


def select_scored_tables(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    scores: Tensor,
    config: SparsePrefillConfig,
    width: int,
) -> BlockTables:
    """Select and pack, for each row of the scores, the fewest blocks that reach gamma; then as above.

    Args:
        query: As above.
        key: As above.
        value: As above.
        scores: (B, H, num_blocks, num_blocks) float32, not negative and zero above the diagonal.
        config: What to select, but for the estimator.
        width: Columns of the tables' indices.
    """
    with torch.cuda.device_of(query):
        reading = Reading(query, key, value, 1.0, config)
        reading.read_scores(scores)
        return choose_blocks_by_row(reading, scores.contiguous(), width)
