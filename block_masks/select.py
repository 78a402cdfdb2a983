"""Cumulative selection and budgets: from attention mass to a set of blocks. Static shapes, no GPU sync."""

from __future__ import annotations

import torch
from torch import Tensor

from flexprefill_compile.settings.config import SparsePrefillConfig

from .layout import count_blocks
from .segments import Segments


def select_cumulative(mass: Tensor, gamma: float | Tensor, segments: Segments | None = None) -> Tensor:
    """Select the fewest entries of each row, or of each of its segments, whose mass reaches ``gamma`` of the total.

    The entry that crosses the threshold is kept, so the share is reached. Equal masses are taken from the left.

    Args:
        mass: (..., N), not negative.
        gamma: In (0, 1]: a number, or a tensor that broadcasts to (..., 1).
        segments: Broadcastable to (..., N); None makes each row one segment.

    Returns:
        (..., N) bool. Source: FlexPrefill, Algorithms 3 and 4, at the granularity of blocks.
    """
    ordered, order = mass.sort(dim=-1, descending=True, stable=True)
    if segments is not None:
        # Stable: within its segment, an entry keeps its rank. Each segment then lies where it lies in ``mass``.
        by_segment = segments.first.int().expand_as(order).gather(-1, order).argsort(dim=-1, stable=True)
        ordered, order = ordered.gather(-1, by_segment), order.gather(-1, by_segment)
    # float64: a float32 running sum over num_blocks ** 2 entries would miss gamma by more than a block's mass.
    reached = ordered.cumsum(-1, dtype=torch.float64)
    missing_before = reached - ordered < _goal(reached, ordered, gamma, segments)
    return torch.zeros_like(missing_before).scatter_(-1, order, missing_before)


def _goal(reached: Tensor, ordered: Tensor, gamma: float | Tensor, segments: Segments | None) -> Tensor:
    """Return where the running sum has ``gamma`` of its segment."""
    if segments is None:
        return gamma * reached[..., -1:]
    first, last = segments.first.expand_as(reached), segments.last.expand_as(reached)
    before = reached.gather(-1, first) - ordered.gather(-1, first)
    return before + gamma * (reached.gather(-1, last) - before)


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
    return bound_rows(selected, score, causal & ~always, min_blocks, max_blocks) | always


def bound_rows(selected: Tensor, score: Tensor, optional: Tensor, min_blocks: int, max_blocks: int | None) -> Tensor:
    """Bring what each row selects of its ``optional`` blocks between two numbers, as in ``apply_budget``."""
    selected = selected & optional
    if min_blocks > 0:
        selected = selected | _best_in_row(score, optional, min_blocks)
    if max_blocks is not None:
        selected = _best_in_row(score, selected, max_blocks)
    return selected


def _best_in_row(score: Tensor, candidates: Tensor, count: int) -> Tensor:
    """Return the ``count`` best-scored candidates of each row, or all where there are fewer."""
    if count >= candidates.shape[-1]:
        return candidates.expand_as(score)
    # A stable sort rather than topk, which leaves open how ties are broken.
    order = score.masked_fill(~candidates, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order[..., :count], True) & candidates


def first_dense_block(length: int, config: SparsePrefillConfig) -> int:
    """Return the query block from which on ``dense_last`` keeps every block, num_blocks for none."""
    if config.dense_last == 0:
        return count_blocks(length, config.block_size)
    return max(0, length - config.dense_last) // config.block_size
