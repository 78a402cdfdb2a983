"""The search for a threshold in one program: the mass from which on entries reach gamma of their total. No sort.

An entry is selected if its mass lies above the threshold, or equals it and stands no further right than the last one
needed. Masses are not negative, so that their float32 bits, read as integers, order them. Exact, up to the rounding of
float32 sums, about 1e-6 of the total.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_threshold(
    bits: tl.tensor,
    place: tl.tensor,
    gamma: float,
    num_entries: int,
    rest: tl.tensor = None,
    rest_place: tl.tensor = None,
) -> tl.tensor:
    """Return the threshold, and the last place at which an entry equal to it is needed.

    Args:
        bits: Of the entries, a vector; -1 is no entry.
        place: Of the entries: equal ones are taken in this order.
        gamma: Share of the total to reach.
        num_entries: How many there are, over all of which the total is spread at most.
        rest: Further entries, if they are not of a number that a vector can have.
        rest_place: Their places.
    """
    total = _mass_from(bits, 0, rest)
    needed = total.to(tl.float64) * gamma
    # Were every entry smaller, all of them together could be left out.
    low = (total * (1 - gamma) / num_entries * 0.999).to(tl.int32, bitcast=True)
    high = tl.max(bits, 0) + 1
    last = tl.max(place, 0)
    if rest is not None:
        high = tl.maximum(high, tl.max(rest, 0) + 1)
        last = tl.maximum(last, tl.max(rest_place, 0))
    above = tl.full([], 0.0, tl.float32)
    while high - low > 1:
        middle = low + (high - low) // 2
        mass = _mass_from(bits, middle, rest)
        is_enough = mass >= needed
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle)
        above = tl.where(is_enough, above, mass)

    threshold = low.to(tl.float32, bitcast=True)
    ties_needed = tl.ceil(((needed - above) / threshold).to(tl.float32)).to(tl.int32)
    num_ties = _count_ties(bits, place, low, last, rest, rest_place)
    before = tl.full([], -1, tl.int32)
    while (num_ties > ties_needed) & (last - before > 1):
        middle = before + (last - before) // 2
        is_enough = _count_ties(bits, place, low, middle, rest, rest_place) >= ties_needed
        before = tl.where(is_enough, before, middle)
        last = tl.where(is_enough, middle, last)
    return threshold, last


@triton.jit
def _mass_from(bits: tl.tensor, low: int, rest: tl.tensor) -> tl.tensor:
    """Return the mass of the entries whose bits are at least ``low``."""
    mass = tl.sum(tl.where(bits >= low, bits.to(tl.float32, bitcast=True), 0.0), 0)
    if rest is not None:
        mass += tl.sum(tl.where(rest >= low, rest.to(tl.float32, bitcast=True), 0.0), 0)
    return mass


@triton.jit
def _count_ties(
    bits: tl.tensor, place: tl.tensor, wanted: int, last: int, rest: tl.tensor, rest_place: tl.tensor
) -> tl.tensor:
    """Return how many entries with the bits ``wanted`` stand no further right than ``last``."""
    count = tl.sum(((bits == wanted) & (place <= last)).to(tl.int32), 0)
    if rest is not None:
        count += tl.sum(((rest == wanted) & (rest_place <= last)).to(tl.int32), 0)
    return count
