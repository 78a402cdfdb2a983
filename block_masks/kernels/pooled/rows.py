"""Triton functions that choose the blocks of several query rows at once: a search for each row's threshold, no sort.

Masses are compared as the bits of float32, which order numbers that are not negative, and summed as whole numbers of
2 ** -30, which rounds nothing further and depends on no order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def choose_in_rows(mass: tl.tensor, optional: tl.tensor, gamma: tl.tensor, min_blocks: int) -> tl.tensor:
    """Choose the fewest blocks of each row that reach gamma, and at least ``min_blocks`` of the optional ones.

    Both sets are the best of their row, equal ones from the left: the longer one is all that is chosen.

    Args:
        mass: (R, N) float32, not negative; a row sums to about 1.
        optional: (R, N) bool.
        gamma: (R,) float32, share of a row's sum.
        min_blocks: More are chosen where there are as many optional ones.
    """
    bits = mass.to(tl.int32, bitcast=True)
    weight = (mass * 1073741824.0 + 0.5).to(tl.int32)
    share = tl.sum(weight, 1).to(tl.float64) * gamma.to(tl.float64)
    mass_goal = tl.ceil(share).to(tl.int64)
    count_goal = tl.minimum(tl.sum(optional.to(tl.int32), 1), min_blocks).to(tl.int64)
    # One sum for both: counts in the upper half.
    both = weight.to(tl.int64) + (optional.to(tl.int64) << 32)
    low = tl.zeros_like(count_goal).to(tl.int32)
    high = tl.max(bits, 1) + 1
    above = tl.zeros_like(count_goal)  # of entries from ``high`` on
    for _ in range(31):  # ``high`` is at most the bits of a number just above 1, less than 2 ** 30
        middle = low + (high - low) // 2
        reached = tl.sum(tl.where(bits >= middle[:, None], both, 0), 1)
        is_enough = ((reached & 0xFFFFFFFF) >= mass_goal) & ((reached >> 32) >= count_goal)
        is_enough |= high - low <= 1  # done: ``low`` is ``middle``
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle)
        above = tl.where(is_enough, above, reached)
    is_tie = bits == low[:, None]
    ties_before = tl.cumsum(tl.where(is_tie, both, 0), 1) - both + above[:, None]
    is_needed = (ties_before & 0xFFFFFFFF) < mass_goal[:, None]
    is_needed |= (ties_before >> 32) < count_goal[:, None]
    return (bits > low[:, None]) | (is_tie & is_needed)


@triton.jit
def keep_best(mass: tl.tensor, candidates: tl.tensor, count: int) -> tl.tensor:
    """Return the ``count`` best of the candidates of each row, or all where there are fewer; equal ones from the left.

    Args:
        mass: (R, N) float32, not negative.
        candidates: (R, N) bool.
        count: How many.
    """
    bits = tl.where(candidates, mass.to(tl.int32, bitcast=True), -1)
    kept = tl.sum(candidates.to(tl.int32), 1)
    goal = tl.minimum(kept, count)
    low = tl.zeros_like(kept)
    high = tl.max(bits, 1) + 1
    above = tl.zeros_like(kept)
    while tl.max(high - low, 0) > 1:
        middle = low + (high - low) // 2
        reached = tl.sum((bits >= middle[:, None]).to(tl.int32), 1)
        is_enough = (reached >= goal) | (high - low <= 1)
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle)
        above = tl.where(is_enough, above, reached)
    is_tie = bits == low[:, None]
    rank = tl.cumsum(is_tie.to(tl.int32), 1)
    return (bits > low[:, None]) | (is_tie & (rank <= (goal - above)[:, None]))
