"""Cumulative selection and budgets: from attention mass to a set of blocks. Static shapes, no host sync."""

from __future__ import annotations

import torch
from torch import Tensor


def select_cumulative(mass: Tensor, gamma: float) -> Tensor:
    """Select the fewest entries of each row whose mass reaches ``gamma`` of the row's total.

    The entry that crosses the threshold is kept, so the share is reached. Equal masses are taken from the left.

    Args:
        mass: (..., N), not negative.
        gamma: In (0, 1].

    Returns:
        (..., N) bool. Source: FlexPrefill, Algorithms 3 and 4, at the granularity of blocks.
    """
    ordered, order = mass.sort(dim=-1, descending=True, stable=True)
    # float64: a float32 running sum over num_blocks ** 2 entries would miss gamma by more than a block's mass.
    reached = ordered.cumsum(-1, dtype=torch.float64)
    missing_before = reached - ordered < gamma * reached[..., -1:]
    return torch.zeros_like(missing_before).scatter_(-1, order, missing_before)


def apply_budget(selected: Tensor, score: Tensor, causal: Tensor, min_blocks: int, max_blocks: int | None) -> Tensor:
    """Bring each query row between two numbers of blocks, then add the sink and the diagonal.

    A row gains its best-scored blocks up to ``min_blocks`` and keeps its best-scored ones down to ``max_blocks``.
    The first key block and the diagonal come on top of both and use up neither.

    Args:
        selected: (B, H, num_blocks, num_blocks) bool or less, rows are query blocks.
        score: (B, H, num_blocks, num_blocks), how much a block matters within its row.
        causal: (num_blocks, num_blocks) bool.
        min_blocks: The floor, in blocks a row.
        max_blocks: The ceiling, in blocks a row; None is no ceiling.

    Returns:
        (B, H, num_blocks, num_blocks) bool, causal.
    """
    num_blocks = causal.shape[-1]
    always = torch.eye(num_blocks, dtype=torch.bool, device=causal.device)
    always[:, 0] = True
    optional = causal & ~always
    selected = selected & optional
    if min_blocks > 0:
        selected = selected | _best_in_row(score, optional, min_blocks)
    if max_blocks is not None:
        selected = _best_in_row(score, selected, max_blocks)
    return selected | always


def _best_in_row(score: Tensor, candidates: Tensor, count: int) -> Tensor:
    """Return the ``count`` best-scored candidates of each row, or all where there are fewer."""
    if count >= candidates.shape[-1]:
        return candidates.expand_as(score)
    # A stable sort rather than topk, which leaves open how ties are broken.
    order = score.masked_fill(~candidates, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order[..., :count], True) & candidates
