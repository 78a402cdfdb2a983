"""Inputs and clocks for ``flexprefill bench`` and ``flexprefill tune``."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

DENSE_BACKENDS = {
    "cpu": (SDPBackend.FLASH_ATTENTION,),
    "cuda": (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION),  # the others are slower still
}

LONGEST_TIMING_MS = 5000


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend causally with shared key heads."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def create_structured_inputs(
    heads: int, kv_heads: int, length: int, head_dim: int, device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Make queries and keys with a sink, a few heavy columns, and topics that last some hundred tokens.

    Returns:
        query (1, heads, length, head_dim), key and value (1, kv_heads, length, head_dim).
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    common = normal(head_dim)
    common /= common.norm()
    topics = normal(length // 512 + 1, head_dim).repeat_interleave(512, 0)[:length]
    query = normal(1, heads, length, head_dim) + 4 * common * head_dim**0.25 + topics
    key = normal(1, kv_heads, length, head_dim) + topics
    heavy = torch.randint(0, length, (16,), generator=generator, device=device)
    heavy[:2] = torch.arange(2, device=device)
    key[:, :, heavy] += 8 * common * head_dim**0.25
    return query.to(dtype), key.to(dtype), normal(1, kv_heads, length, head_dim).to(dtype)


def time_dense_ms(query: Tensor, key: Tensor, value: Tensor, calls: int) -> dict[str, float]:
    """Time each dense backend that takes the inputs."""
    times = {}
    for backend in DENSE_BACKENDS[query.device.type]:
        # RuntimeError: not built in, or not for these inputs.
        with sdpa_kernel(backend), contextlib.suppress(RuntimeError):
            times[backend.name.removesuffix("_ATTENTION").lower()] = time_ms(
                lambda: attend(query, key, value), query.device.type, calls
            )
    return times


def time_ms(run: Callable[[], object], device: str, calls: int) -> float:
    """Return the median of up to ``calls`` timed calls, in milliseconds, after two that warm up.

    Slow calls are timed less often: together they take about ``LONGEST_TIMING_MS``. Of those that would be timed but
    once, the second that warms up is the measurement.

    On a GPU, of CUDA events around calls that are queued together, as the layers of a model queue theirs: the time of
    the device, or of the host where that is longer.
    """
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    warm_ms = (time.perf_counter() - start) * 1e3
    calls = min(calls, int(LONGEST_TIMING_MS / warm_ms))
    if calls < 2:
        return warm_ms
    if device == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        torch.cuda.synchronize()
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        torch.cuda.synchronize()
        return statistics.median(float(a.elapsed_time(b)) for a, b in itertools.pairwise(marks))
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)
