"""Sums over runs: neighbouring elements that belong together, such as the blocks of one packed sequence.

Everywhere, None in place of the runs makes each row one run, at the cost of a plain reduction. Then results have one
element a row, otherwise each element gets the result of its run; both broadcast. Static shapes, no host sync.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Runs(NamedTuple):
    """The run of each element, int64 and broadcastable to the summed tensor's (..., N).

    Attributes:
        first: Index of the first element of the run; the same for all its elements, and ascending.
        last: Index of its last element. What lies between it and the next run must be neutral: zero, or masked.
    """

    first: Tensor
    last: Tensor


def sum_runs(x: Tensor, runs: Runs | None) -> Tensor:
    """Sum each run of (..., N): (..., 1) for one run a row, else (..., N)."""
    if runs is None:
        return x.sum(-1, keepdim=True)
    # Differences of running sums, in float64 exact enough: scatter_add would add in any order on a GPU.
    sums = torch.nn.functional.pad(x.cumsum(-1, dtype=torch.float64), (1, 0))
    before = sums.gather(-1, runs.first.expand_as(x))
    return (sums.gather(-1, (runs.last + 1).expand_as(x)) - before).to(x.dtype)


def logsumexp_runs(x: Tensor, runs: Runs | None) -> Tensor:
    """Return log(sum(exp(x))) of each run of (..., N), shaped as by ``sum_runs``; -inf where all of it is."""
    if runs is None:
        return x.logsumexp(-1, keepdim=True)
    first = runs.first.expand_as(x)
    largest = torch.full_like(x, -torch.inf).scatter_reduce(-1, first, x, "amax").gather(-1, first)
    largest = largest.masked_fill(largest == -torch.inf, 0)
    return sum_runs((x - largest).exp(), runs).log() + largest
