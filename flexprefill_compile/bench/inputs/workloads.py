"""Inputs and clocks for ``flexprefill bench`` and ``flexprefill tune``."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence

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


def find_fastest_dense(query: Tensor, key: Tensor, value: Tensor) -> SDPBackend:
    """Return the dense backend that takes the least time for the inputs."""
    times = time_dense_ms(query, key, value, calls=3)
    return _find_backend(min(times, key=lambda name: times[name]), query.device.type)


def time_dense_ms(query: Tensor, key: Tensor, value: Tensor, calls: int) -> dict[str, float]:
    """Time each dense backend that takes the inputs, by its name.

    Raises:
        torch.OutOfMemoryError: One of them doesn't fit into memory.
    """
    times = {}
    for backend in DENSE_BACKENDS[query.device.type]:
        name = name_backend(backend)
        try:
            times[name] = time_ms(bind_dense(name, query, key, value), query.device.type, calls)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # not built in, or not for these inputs
            continue
    return times


def bind_dense(name: str, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    """Return the call of a dense backend, by the name that ``time_dense_ms`` gives it."""
    backend = _find_backend(name, query.device.type)

    def attend_by_backend() -> Tensor:
        with sdpa_kernel(backend):
            return attend(query, key, value)

    return attend_by_backend


def name_backend(backend: SDPBackend) -> str:
    """Return the name under which a dense backend is printed."""
    return backend.name.removesuffix("_ATTENTION").lower()


def _find_backend(name: str, device: str) -> SDPBackend:
    return next(backend for backend in DENSE_BACKENDS[device] if name_backend(backend) == name)


def time_ms(run: Callable[[], object], device: str, calls: int) -> float:
    """Return the time of a call, as ``time_in_turns_ms`` does."""
    return time_in_turns_ms([run], device, calls)[0]


def time_in_turns_ms(runs: Sequence[Callable[[], object]], device: str, calls: int) -> list[float]:
    """Time up to ``calls`` calls of each, in milliseconds, after two that warm up: the mean of their middle half.

    They take turns, and every other round backwards, so that a clock that slows down slows all of them. A GPU at its
    power limit goes up and down by 5 % from one long call to the next: of turns in one order, or by the median, which
    is one of the two, that would be the difference. Slow calls are timed less often: a kind of them takes about
    ``LONGEST_TIMING_MS``. Of those that would be timed but once, the second that warms up is the measurement.

    On a GPU, of CUDA events around calls that are queued together, as the layers of a model queue theirs: the time of
    the device, or of the host where that is longer.
    """
    for run in runs:
        run()
    warm_ms = [_time_once_ms(run, device) for run in runs]
    calls = min(calls, int(LONGEST_TIMING_MS * len(runs) / sum(warm_ms)))
    if calls < 2:
        return warm_ms
    forwards = list(range(len(runs)))
    turns = [turn for number in range(calls) for turn in (forwards[::-1] if number % 2 else forwards)]
    if device == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(turns) + 1)]
        torch.cuda.synchronize()
        marks[0].record()
        for mark, turn in zip(marks[1:], turns, strict=True):
            runs[turn]()
            mark.record()
        torch.cuda.synchronize()
        times = [float(a.elapsed_time(b)) for a, b in itertools.pairwise(marks)]
    else:
        times = [_time_once_ms(runs[turn], device) for turn in turns]
    return [average_middle_half([ms for ms, turn in zip(times, turns, strict=True) if turn == own]) for own in forwards]


def average_middle_half(times: Sequence[float]) -> float:
    """Return the mean of what is left without the lowest and the highest quarter, rounded down."""
    cut = len(times) // 4
    return statistics.mean(sorted(times)[cut : len(times) - cut])


def _time_once_ms(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3
