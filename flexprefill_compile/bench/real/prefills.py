"""One uncompiled prefill of a model whose attention goes to a method, with its attention timed by itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flexprefill_compile.block_masks import record_densities

from ...quality.model_prefill import Prompt, prefill_dense
from ...quality.swapped_attention import swapped_attention
from .methods import Method


class Cost(NamedTuple):
    """What a prefill took.

    Attributes:
        attention_ms: Of all attention calls, selection included.
        prefill_ms: Of the whole prefill, to the logits of the last token.
        peak_mib: Memory at its peak, weights included; 0 on a CPU.
    """

    attention_ms: float
    prefill_ms: float
    peak_mib: float


class AttentionClock:
    """Sums the time of the device between a start and a stop."""

    def __init__(self, device_type: str) -> None:
        self._is_cuda = device_type == "cuda"
        self._marks: list[tuple[Any, Any]] = []

    def time(self, run: Callable[[], Tensor]) -> Tensor:
        """Run something and count its time."""
        start = self._mark()
        output = run()
        self._marks.append((start, self._mark()))
        return output

    def _mark(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def total_ms(self) -> float:
        """Return the sum; waits for the device."""
        if not self._is_cuda:
            return float(sum(stop - start for start, stop in self._marks)) * 1e3
        torch.cuda.synchronize()
        return float(sum(start.elapsed_time(stop) for start, stop in self._marks))


def prefill_for_logits(model: nn.Module, tokens: Tensor, method: Method) -> tuple[Tensor, float]:
    """Return the logits of a prefill, (1, S, vocabulary), and its mean density, 1 where nothing was selected.

    Waits for the device.
    """
    with record_densities() as densities, swapped_attention(model, _swap_in(method)) as heads:
        logits = prefill_dense(model, Prompt((tokens,), {"use_cache": True}))
    del heads
    return logits, torch.stack([found.mean() for found in densities]).mean().item() if densities else 1.0


def prefill_for_time(model: nn.Module, tokens: Tensor, method: Method) -> Cost:
    """Time a prefill to the logits of its last token. Waits for the device."""
    device_type = tokens.device.type
    clock, whole = AttentionClock(device_type), AttentionClock(device_type)
    if device_type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def run() -> Tensor:
        logits: Tensor = model(tokens, use_cache=True, logits_to_keep=1).logits
        return logits

    with torch.no_grad(), swapped_attention(model, _swap_in(method, clock)):
        whole.time(run)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device_type == "cuda" else 0.0
    return Cost(clock.total_ms(), whole.total_ms(), peak)


def _swap_in(method: Method, clock: AttentionClock | None = None) -> Callable[..., Tensor]:
    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        def run() -> Tensor:
            return method.attend(query, key, value)

        return run() if clock is None else clock.time(run)

    return attend
