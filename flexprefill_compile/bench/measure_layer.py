"""One row of the benchmark: everything that is timed and judged on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from flexprefill_compile.block_masks import record_densities
from flexprefill_compile.block_masks.layout import BlockTables, count_blocks, create_causal_grid, pack_causal_blocks
from flexprefill_compile.block_masks.prefill import create_block_mask

from ..backend import FlexPrefillBackend
from ..settings.config import SparsePrefillConfig
from ..torch_internals import copy_function
from .peers import Peer
from .selection_quality import measure_disagreement, measure_error, measure_recall
from .timing.clocks import time_in_turns_ms, time_ms
from .timing.dense_attention import attend, bind_dense, time_dense_ms
from .timing.rates import ATTENTION, compute_floors
from .timing.stages import capture, measure_peak_mib, time_stages

_FLEX_BLOCK_SIZE = 128  # as torch has it
Inputs = tuple[Tensor, Tensor, Tensor]


def measure_layer(
    inputs: Inputs, config: SparsePrefillConfig, rates: dict[str, float], calls: int, peers: Mapping[str, Peer]
) -> dict[str, Any]:
    """Measure one layer; times in milliseconds.

    Args:
        inputs: Query, key and value, as ``create_inputs`` makes them.
        config: What to select. Its ``max_density`` is for the column "under the ceiling"; the others have none.
        rates: Of ``measure_rates``.
        calls: Timed calls of each kind, at most.
        peers: Callables to time beside ours, by name.

    Raises:
        AttentionSkippedError: The call would stay dense, for ``kernel_backend="flash"`` that doesn't fit it.
    """
    query, key, value = inputs
    device, scale = query.device.type, query.shape[-1] ** -0.5

    def select() -> BlockTables:
        return BlockTables(*torch.ops.flexprefill.select_blocks(query, key, value, scale, *config.selection))

    sparse = _compile_sparse(config, inputs, min_length=1, max_density=1, on_skip="raise")
    dense = time_dense_ms(query, key, value, calls)
    exact = attend(query, key, value)
    with record_densities() as densities:
        error = measure_error(sparse(), exact)
    figures: dict[str, Any] = {
        "density": densities[0].mean().item(),
        "recall": measure_recall(query, key, select(), scale, config.block_size),
        "error": error,
        "dense_ms": dense,
        "dense_flex_ms": time_ms(_compile_dense_flex(inputs), device, calls),
        "selection_ms": time_ms(select, device, calls),
        "sparse_ms": time_ms(sparse, device, calls),
    }
    figures["floors_ms"] = compute_floors(query, key, value, config.block_size, figures["density"], rates)
    if config.max_density is not None:
        fastest = bind_dense(min(dense, key=lambda name: dense[name]), query, key, value)
        ceiling_ms, dense_ms = time_in_turns_ms([_compile_sparse(config, inputs), fastest], device, calls)
        figures["ceiling"] = {"ms": ceiling_ms, "dense_ms": dense_ms}
    if device == "cuda":
        figures |= _measure_on_gpu(select, sparse, calls)
        figures["disagreement"] = measure_disagreement(query, key, value, select(), config)
        if attention_ms := figures["stages_ms"][ATTENTION]:  # none of a kernel by a name that isn't known
            figures["attention_flop_per_s"] = rates["product"] * figures["floors_ms"][ATTENTION] / attention_ms
    for name, peer in peers.items():
        figures.setdefault("peers", {})[name] = _measure_peer(peer, inputs, exact, calls)
    return figures


def _measure_on_gpu(select: Callable[[], object], sparse: Callable[[], object], calls: int) -> dict[str, Any]:
    return {
        "stages_ms": time_stages(sparse),
        "selection_peak_mib": measure_peak_mib(select),
        "sparse_peak_mib": measure_peak_mib(sparse),
        "selection_replayed_ms": time_ms(capture(select), "cuda", calls),
        "sparse_replayed_ms": time_ms(capture(sparse), "cuda", calls),
    }


def _compile_sparse(config: SparsePrefillConfig, inputs: Inputs, **options: Any) -> Callable[[], Tensor]:
    """Compile attention as a user would."""
    given = {
        name: getattr(config, name)
        for name in ("gamma", "min_budget", "max_budget", "max_density", "block_size", "estimator", "kernel_backend")
    }
    given |= {"kernel_options": dict(config.kernel_options)} | options
    backend = FlexPrefillBackend()
    compiled = torch.compile(copy_function(attend), backend=backend, dynamic=False, fullgraph=True, options=given)
    return lambda: compiled(*inputs)


def _compile_dense_flex(inputs: Inputs) -> Callable[[], Tensor]:
    """Compile FlexAttention over all causal blocks, as it comes: in its own blocks, with its own tiles."""
    query, key, value = inputs
    length = query.shape[2]
    grid = create_causal_grid(count_blocks(length, _FLEX_BLOCK_SIZE), query.device)
    block_mask = create_block_mask(pack_causal_blocks(grid[None, None]), length, length, _FLEX_BLOCK_SIZE)

    def attend_in_blocks(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask) -> Tensor:
        output = flex_attention(query, key, value, block_mask=block_mask, enable_gqa=True)
        assert isinstance(output, Tensor)
        return output

    compiled = torch.compile(copy_function(attend_in_blocks), dynamic=False, fullgraph=True)
    return lambda: compiled(query, key, value, block_mask)


def _measure_peer(peer: Peer, inputs: Inputs, exact: Tensor, calls: int) -> dict[str, float]:
    error = measure_error(peer(*inputs), exact)
    return {"ms": time_ms(lambda: peer(*inputs), exact.device.type, calls), "error": error}
