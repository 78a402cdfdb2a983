"""Clocks for a GPU: each kernel of a call, a call replayed without its host, and its memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from .rates import ATTENTION

SELECTION_STAGES = (
    "pool_keys",
    "select_by_pools",
    "score_pieces",
    "pool_pieces",
    "pool_inputs",
    "score_representative",
    "pool_masses",
    "choose_patterns",
    "estimate_attention",
    "find_map_thresholds",
    "narrow_thresholds",
    "pack_blocks",
)
# By what is in the names of kernels: the Triton template's and flash-attn-4's.
_ATTENTION_KERNELS = ("flex_attention", "flash_fwd")
_PROFILED_CALLS = 5


def capture(run: Callable[[], object]) -> Callable[[], None]:
    """Return a replay of what a call launches, as a CUDA graph: no time of the host in it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure_peak_mib(run: Callable[[], object]) -> float:
    """Return how much memory a call takes at its peak beside its inputs, in MiB."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def time_stages(run: Callable[[], object]) -> dict[str, float]:
    """Return the milliseconds of each of our kernels and of FlexAttention's in a call, by the profiler."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(_PROFILED_CALLS):
            run()
        torch.cuda.synchronize()
    times = dict.fromkeys((*SELECTION_STAGES, ATTENTION), 0.0)
    kernels = {stage: (stage,) for stage in SELECTION_STAGES} | {ATTENTION: _ATTENTION_KERNELS}
    for event in profiler.key_averages():
        for stage, names in kernels.items():
            if any(name in event.key for name in names):
                times[stage] += event.device_time_total / _PROFILED_CALLS / 1e3
    return times
