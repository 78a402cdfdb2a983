"""Time to the first token over several ranks: each way to share a prefill, dense and sparse, with its collectives."""

from __future__ import annotations

import dataclasses
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from flexprefill_compile.block_masks import record_densities

from ..backend import FlexPrefillBackend
from ..parallel import broadcast_last, take_stretch
from ..settings.rank_groups import RankGroup, resolve_rank_group
from .decoder import Decoder, DecoderShape, Layer, create_decoder, run_layer
from .inputs.kinds import create_inputs
from .timing.dense_attention import find_fastest_dense

WAYS = ("one", "sequence", "tensor")
KINDS = ("dense", "sparse")

_LONGEST_TRIAL = 32768  # tokens on which dense backends are compared
_COLLECTIVES = {"cuda": "nccl", "cpu": "_c10d_functional::"}
_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankBench:
    """What to measure.

    Attributes:
        shape: Of the decoder.
        lengths: In tokens; multiples of the ranks.
        ways: Of WAYS. "one" is the whole model on rank 0, while the others wait.
        kinds: Of KINDS.
        options: The options of ``torch.compile`` for a sparse prefill of a length.
        device: "cuda" or "cpu".
    """

    shape: DecoderShape
    lengths: Sequence[int]
    ways: Sequence[str]
    kinds: Sequence[str]
    options: Callable[[int], dict[str, Any]]
    device: str


def start_ranks(device: str) -> RankGroup:
    """Join the process group that torchrun describes, with NCCL on GPUs and gloo on CPUs; return its ranks."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    group = resolve_rank_group("group", dist.group.WORLD)
    assert group is not None
    return group


def measure_on_ranks(bench: RankBench, group: RankGroup) -> Iterator[dict[str, Any]]:
    """Yield the figures of each way, length and kind, on every rank; those of "one" on rank 0 alone.

    Times and peaks of memory are those of the slowest and fullest rank. What is yielded has ``ms``, ``memory_gib``
    (0 on a CPU), ``collectives``, the share of the time in them with the waiting for other ranks, and for sparse
    prefills ``density`` and ``uneven``: how much more than the mean the ranks with the most blocks compute.
    """
    dtype = torch.bfloat16 if bench.device == "cuda" else torch.float32
    for way in bench.ways:
        if way == "one" and group.rank != 0:
            for _ in range(len(bench.lengths) * len(bench.kinds)):
                dist.barrier()
            continue
        torch.manual_seed(0)
        model = create_decoder(bench.shape, bench.device, dtype, group if way == "tensor" else None)
        for length in bench.lengths:
            for kind in bench.kinds:
                row = {"way": way, "tokens": length, "kind": kind}
                yield row | _try(lambda model=model, row=row: _measure(bench, group, model, **row), way)  # type: ignore[misc]
                _free_memory()
                if way == "one":
                    dist.barrier()
        del model
        _free_memory()


def _try(measure: Callable[[], dict[str, Any]], way: str) -> dict[str, Any]:
    """Measure; a prefill of one rank that doesn't fit gets a note. Where others take part, it ends the run."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        if way != "one":
            raise
        return {"note": "out of memory"}


def _measure(bench: RankBench, group: RankGroup, model: Decoder, *, way: str, tokens: int, kind: str) -> dict[str, Any]:
    prompt = torch.randint(0, bench.shape.vocabulary, (1, tokens), device=bench.device)
    start = 0
    if way == "sequence":
        prompt = take_stretch(prompt, group)
        start = group.rank * prompt.shape[1]
    compiled = _compile(bench, group, way, tokens, kind)

    def prefill() -> Tensor:
        token, _ = model(prompt, compiled, start)
        return broadcast_last(token[None], group) if way == "sequence" else token

    with record_densities() as densities:
        prefill()
    ranks = None if way == "one" else group
    return _time(prefill, bench.device, ranks) | _summarise_densities(densities, ranks)


def _compile(bench: RankBench, group: RankGroup, way: str, tokens: int, kind: str) -> Callable[..., Any]:
    options: dict[str, Any] = bench.options(tokens) if kind == "sparse" else {"min_length": 2**40}
    if way != "one":
        options |= {f"{way}_parallel": group}
    torch.compiler.reset()
    if kind == "sparse":
        return torch.compile(run_layer, backend=FlexPrefillBackend(), dynamic=False, options=options)
    heads = bench.shape.heads // (1 if way == "one" else group.size)
    kv_heads = max(1, bench.shape.kv_heads // (1 if way == "one" else group.size))
    dtype = torch.bfloat16 if bench.device == "cuda" else torch.float32
    trial = (heads, kv_heads), min(tokens, _LONGEST_TRIAL), bench.shape.head_dim, bench.device, dtype, None
    backend = find_fastest_dense(*create_inputs("random", *trial))

    # The choice stands in the graph: inductor's caches don't look at what is set around it.
    def run_layer_densely(layer: Layer, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with sdpa_kernel(backend):
            return run_layer(layer, x, position)

    return torch.compile(run_layer_densely, backend=FlexPrefillBackend(), dynamic=False, options=options)


def _time(prefill: Callable[[], Tensor], device: str, ranks: RankGroup | None) -> dict[str, Any]:
    """Time one prefill under the profiler, whose own time is lost in a prefill's, and sum up its collectives."""
    _synchronise(device, ranks)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiled:
        start = time.perf_counter()
        prefill()
        _synchronise(device, None)
        ms = (time.perf_counter() - start) * 1e3
    events = [event for event in profiled.key_averages() if _COLLECTIVES[device] in event.key.lower()]
    on_device = device == "cuda"
    busy_us = sum(event.self_device_time_total if on_device else event.self_cpu_time_total for event in events)
    memory = torch.cuda.max_memory_allocated() / _GIB if on_device else 0.0
    return {
        "ms": _largest(ms, device, ranks),
        "memory_gib": _largest(memory, device, ranks),
        "collectives": _largest(busy_us / 1e3 / ms, device, ranks),
    }


def _summarise_densities(densities: list[Tensor], ranks: RankGroup | None) -> dict[str, Any]:
    if not densities:
        return {}
    by_layer = torch.stack([density.mean().float() for density in densities])
    gathered = [by_layer]
    if ranks is not None:
        gathered = [torch.empty_like(by_layer) for _ in range(ranks.size)]
        dist.all_gather(gathered, by_layer)
    of_ranks = torch.stack(gathered)
    mean = of_ranks.mean().item()
    return {"density": mean, "uneven": of_ranks.amax(0).mean().item() / mean - 1}


def _largest(value: float, device: str, ranks: RankGroup | None) -> float:
    if ranks is None:
        return value
    largest = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def _synchronise(device: str, ranks: RankGroup | None) -> None:
    if ranks is not None:
        dist.barrier()
    if device == "cuda":
        torch.cuda.synchronize()


def _free_memory() -> None:
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
