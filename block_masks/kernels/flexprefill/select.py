"""The selection of ``prefill.select_prefill_blocks`` on a GPU, by Triton kernels.

    pool_inputs -> score_representative -> pool_masses -> choose_patterns        each head's pattern and profile
    estimate_attention -> find_map_thresholds or narrow_thresholds               maps of query-aware heads
    pack_blocks                                                                  tables

With an estimator's scores only pool_inputs and pack_blocks run. No GPU sync: launch shapes depend on the sizes alone.
Which heads are query-aware is decided on the device; the others leave the kernels for maps at once.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from flexprefill_compile.settings.config import SparsePrefillConfig

from ...layout import BlockTables, count_blocks
from ..launch import run_first_that_fits
from .buffers import SelectionBuffers
from .choose_patterns import QUERY_AWARE, launch_choose_patterns
from .estimate_attention import launch_estimate_attention
from .find_map_thresholds import launch_find_map_thresholds
from .narrow_thresholds import launch_narrow_thresholds
from .pack_blocks import launch_pack_blocks
from .pool_inputs import launch_pool_inputs
from .pool_masses import launch_pool_masses
from .score_representative import launch_score_representative

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LARGEST_HEAD_DIM = 256
_MOST_BLOCKS = 16384  # a row of the grid is one vector of registers
MAPS_AT_ONCE_BYTES = 2**29  # of pooled attention, float32: more heads take more launches
MOST_BLOCKS_HELD = 256  # a side of a map that fits the registers of one program


def can_select(query: Tensor, value: Tensor | None, config: SparsePrefillConfig) -> bool:
    """Tell whether the kernels take these inputs."""
    value_dim = 0 if value is None else value.shape[-1]
    return (
        query.dtype in _DTYPES
        and max(query.shape[-1], value_dim) <= _LARGEST_HEAD_DIM
        and count_blocks(query.shape[-2], config.block_size) <= _MOST_BLOCKS
    )


def try_select(
    query: Tensor, key: Tensor, value: Tensor | None, scale: float, config: SparsePrefillConfig, width: int
) -> BlockTables | None:
    """Select by the kernels, or return None where they don't take the inputs or the GPU is too small for a tile."""
    if not can_select(query, value, config):
        return None
    select = functools.partial(select_tables, query, key, value, scale, config, width)
    return run_first_that_fits((select,), "blocks are selected")


def try_select_scored(
    query: Tensor, key: Tensor, value: Tensor | None, scores: Tensor, config: SparsePrefillConfig, width: int
) -> BlockTables | None:
    """Select by an estimator's scores, or return None where the GPU is too small for a tile."""
    select = functools.partial(select_scored_tables, query, key, value, scores, config, width)
    return run_first_that_fits((select,), "blocks are selected")


def select_tables(
    query: Tensor, key: Tensor, value: Tensor | None, scale: float, config: SparsePrefillConfig, width: int
) -> BlockTables:
    """Select and pack the blocks of causal attention.

    The blocks are those of ``select_prefill_blocks``, but for masses within rounding of a threshold. Beside the
    result, memory peaks at the pooled query, at four numbers for each 1 / block_size of the representative scores, and
    at the maps of pooled attention, (B, H, num_blocks, num_blocks) float32 or ``MAPS_AT_ONCE_BYTES``, whichever is
    less, but no less than one map.

    Args:
        query: (B, H, S, D), float16, bfloat16 or float32, any strides.
        key: (B, Hkv, S, D), of the same dtype.
        value: (B, Hkv, S, Dv), read for its NaN and inf only; None skips that check.
        scale: Factor on the scores.
        config: What to select.
        width: Columns of the tables' indices.
    """
    with torch.cuda.device_of(query):
        buffers = SelectionBuffers(query, key, value, scale, config)
        _choose_patterns(buffers)
        return _choose_blocks(buffers, width)


def select_scored_tables(
    query: Tensor, key: Tensor, value: Tensor | None, scores: Tensor, config: SparsePrefillConfig, width: int
) -> BlockTables:
    """Select and pack, for each row of the scores, the fewest blocks that reach gamma; then as ``select_tables``.

    Args:
        query: As in ``select_tables``.
        key: As in ``select_tables``.
        value: As in ``select_tables``.
        scores: (B, H, num_blocks, num_blocks) float32, not negative and zero above the diagonal.
        config: What to select, but for the estimator.
        width: Columns of the tables' indices.
    """
    with torch.cuda.device_of(query):
        buffers = SelectionBuffers(query, key, value, 1.0, config)
        launch_pool_inputs(buffers)
        _trust_finite_scores(buffers, scores)
        tables = _create_tables(buffers, width)
        launch_pack_blocks(buffers, scores.contiguous(), tables, 0, buffers.batch * buffers.heads, by_row=True)
        return tables


def _choose_patterns(buffers: SelectionBuffers) -> None:
    """Pool the inputs, score the representative queries, and choose each head's pattern."""
    if buffers.config.is_dense:
        buffers.patterns.zero_()  # every block
        return
    launch_pool_inputs(buffers)
    masses, chunk_masses = launch_score_representative(buffers)
    launch_choose_patterns(buffers, launch_pool_masses(buffers, masses, chunk_masses))


def _choose_blocks(buffers: SelectionBuffers, width: int) -> BlockTables:
    """Choose and pack by the patterns of the heads, a number of heads at a time."""
    num_heads, num_blocks = buffers.batch * buffers.heads, buffers.num_blocks
    at_once = min(num_heads, max(1, MAPS_AT_ONCE_BYTES // (4 * num_blocks**2)))
    has_maps = buffers.config.tau > 0
    find_thresholds = launch_find_map_thresholds if num_blocks <= MOST_BLOCKS_HELD else launch_narrow_thresholds
    maps = buffers.profiles.new_empty(at_once if has_maps else 0, num_blocks, num_blocks)
    tables = _create_tables(buffers, width)
    for first in range(0, num_heads, at_once):
        count = min(at_once, num_heads - first)
        if has_maps:
            launch_estimate_attention(buffers, maps, first, count)
            if min(buffers.config.gammas) < 1:
                find_thresholds(buffers, maps, first, count)
        launch_pack_blocks(buffers, maps, tables, first, count)
    return tables


def _trust_finite_scores(buffers: SelectionBuffers, scores: Tensor) -> None:
    """Choose the scores, (B, H, num_blocks, num_blocks), for heads that are finite, else every block."""
    peak = buffers.key_peak.amax(-1) if buffers.value is None else (buffers.key_peak + buffers.value_peak).amax(-1)
    peak = buffers.query_peak.amax(-1) + peak.repeat_interleave(buffers.heads // buffers.kv_heads)
    is_finite = torch.isfinite(scores.sum((-2, -1)).view(-1)) & torch.isfinite(peak)
    buffers.patterns.copy_(is_finite).mul_(QUERY_AWARE.value)


def _create_tables(buffers: SelectionBuffers, width: int) -> BlockTables:
    counts = (buffers.batch, buffers.heads, buffers.num_blocks)
    indices = (*counts, width)
    return BlockTables(*(buffers.patterns.new_empty(shape, dtype=torch.int32) for shape in (counts, indices) * 2))
