"""The time of a call: repeated, in turns with others, without its outliers."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch

_LONGEST_TIMING_MS = 5000


def time_ms(run: Callable[[], object], device: str, calls: int) -> float:
    """Return the time of a call, as ``time_in_turns_ms`` does."""
    return time_in_turns_ms([run], device, calls)[0]


def time_in_turns_ms(runs: Sequence[Callable[[], object]], device: str, calls: int) -> list[float]:
    """Time up to ``calls`` calls of each, in milliseconds, after two that warm up: the mean of their middle half.

    They take turns, and every other round backwards, so that a clock that slows down slows all of them. A GPU at its
    power limit goes up and down by 5 % from one long call to the next: of turns in one order, or by the median, which
    is one of the two, that would be the difference. Slow calls are timed less often: a kind of them takes about
    ``_LONGEST_TIMING_MS``. Of those that would be timed but once, the second that warms up is the measurement.

    On a GPU, of CUDA events around calls that are queued together, as the layers of a model queue theirs: the time of
    the device, or of the host where that is longer.
    """
    for run in runs:
        run()
    warm_ms = [_time_once_ms(run, device) for run in runs]
    calls = min(calls, int(_LONGEST_TIMING_MS * len(runs) / sum(warm_ms)))
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
