"""Sums over segments: neighbouring elements that belong together, such as the blocks of one packed sequence.

Without segments (None) each row is one segment, and a plain reduction gives one element a row. With segments each
element gets the result of its segment. Both broadcast. Static shapes, no GPU sync.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """The segment of each element, int64 and broadcastable to the summed tensor's (..., N).

    Attributes:
        first: Index of the first element of the segment; the same for all its elements, and ascending.
        last: Index of its last element. What lies between it and the next segment must be neutral: zero, or masked.
    """

    first: Tensor
    last: Tensor


def sum_segments(x: Tensor, segments: Segments | None) -> Tensor:
    """Sum each segment of (..., N): (..., 1) for one segment a row, else (..., N)."""
    if segments is None:
        return x.sum(-1, keepdim=True)
    # Differences of running sums, in float64 exact enough: scatter_add would add in any order on a GPU.
    sums = torch.nn.functional.pad(x.cumsum(-1, dtype=torch.float64), (1, 0))
    before = sums.gather(-1, segments.first.expand_as(x))
    return (sums.gather(-1, (segments.last + 1).expand_as(x)) - before).to(x.dtype)


def logsumexp_segments(x: Tensor, segments: Segments | None) -> Tensor:
    """Return log(sum(exp(x))) of each segment of (..., N), shaped as by ``sum_segments``; -inf if all are."""
    if segments is None:
        return x.logsumexp(-1, keepdim=True)
    first = segments.first.expand_as(x)
    largest = torch.full_like(x, -torch.inf).scatter_reduce(-1, first, x, "amax").gather(-1, first)
    largest = largest.masked_fill(largest == -torch.inf, 0)
    return sum_segments((x - largest).exp(), segments).log() + largest
