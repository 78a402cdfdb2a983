"""The Triton kernel that finds the thresholds of large maps, by several programs a map, and its launches."""

from __future__ import annotations

import struct

import triton
import triton.language as tl
from torch import Tensor

from ..launch import next_power_of_2
from .buffers import SelectionBuffers
from .choose_patterns import QUERY_AWARE

_ABOVE_ONE = tl.constexpr(0x3F800100)  # bits of a float32 just above 1, which no mass exceeds
_SECTIONS, _CHUNKS = 8, 64


def launch_narrow_thresholds(buffers: SelectionBuffers, maps: Tensor, first: int, count: int) -> None:
    """Find the thresholds of the maps of ``count`` heads of B * H, in as many turns as their bits can need."""
    lowest, num_turns = _plan_search(max(buffers.config.gammas), buffers.num_blocks)
    brackets = buffers.patterns.new_empty(num_turns, count, 2)
    masses = buffers.profiles.new_empty(num_turns, count, _CHUNKS, _SECTIONS)
    for turn in range(num_turns + 1):
        buffers.run(
            narrow_thresholds,
            (_CHUNKS if turn < num_turns else 1, count),
            {
                "estimate": maps,
                "patterns": buffers.patterns,
                "brackets": brackets,
                "masses": masses,
                "thresholds": buffers.thresholds,
                "last_ties": buffers.last_ties,
                "gammas": buffers.gammas,
                "gamma": buffers.config.gammas[0],
                "lowest": lowest,
                "turn": turn,
                "num_turns": num_turns,
                "first_head": first,
                "num_blocks": buffers.num_blocks,
                "heads": buffers.heads,
                "TILE": min(next_power_of_2(buffers.num_blocks), 256),
                "CHUNKS": _CHUNKS,
                "SECTIONS": _SECTIONS,
                "HAS_GAMMAS": buffers.has_gammas,
            },
            num_warps=2,
        )


def _plan_search(largest_gamma: float, num_blocks: int) -> tuple[int, int]:
    """Return the lowest bits that a threshold can have, and how many turns narrow the range from there to 1."""
    # Were every entry smaller, all of them together could be left out.
    smallest = 1.998 * (1 - largest_gamma) / (num_blocks + 1)
    (lowest,) = struct.unpack("i", struct.pack("f", smallest))
    span, num_turns = _ABOVE_ONE.value - lowest, 0
    while span > 1:
        span = -(-span // (_SECTIONS + 1))
        num_turns += 1
    return lowest, num_turns


@triton.jit
def narrow_thresholds(
    estimate: tl.tensor,
    patterns: tl.tensor,
    brackets: tl.tensor,
    masses: tl.tensor,
    thresholds: tl.tensor,
    last_ties: tl.tensor,
    gammas: tl.tensor,
    gamma: float,
    lowest: int,
    turn: int,
    num_turns: int,
    first_head: int,
    num_blocks: int,
    heads: int,
    TILE: tl.constexpr,
    CHUNKS: tl.constexpr,
    SECTIONS: tl.constexpr,
    HAS_GAMMAS: tl.constexpr,
) -> None:
    """Take one turn of the search over large maps, by several programs a head. Grid: (CHUNKS, heads).

    Each turn reads the masses that the turn before left, narrows the bracket, and sums anew; the last one writes the
    threshold. Entries equal to it are all selected. ``brackets`` is (turns, heads, 2) and ``masses``
    (turns, heads, CHUNKS, SECTIONS), float32.
    """
    chunk = tl.program_id(0)
    local = tl.program_id(1).to(tl.int64)
    program = first_head + local
    if tl.load(patterns + program) != QUERY_AWARE:
        return
    if HAS_GAMMAS:
        gamma = tl.load(gammas + program % heads)
    cut = tl.arange(0, SECTIONS)
    low = tl.full([], 0, tl.int32) + lowest
    high = tl.full([], _ABOVE_ONE, tl.int32)
    if turn > 0:
        before = (turn - 1) * tl.num_programs(1) + local
        low = tl.load(brackets + before * 2)
        high = tl.load(brackets + before * 2 + 1)
        place = before * CHUNKS * SECTIONS + tl.arange(0, CHUNKS)[:, None] * SECTIONS + cut[None, :]
        # A row of the map sums to 1.
        needed = tl.cast(num_blocks, tl.float64) * gamma
        low, high = _narrow(tl.sum(tl.load(masses + place).to(tl.float64), 0), needed, low, high, SECTIONS)
    if turn == num_turns:
        if chunk == 0:
            tl.store(thresholds + program * 2, low.to(tl.float32, bitcast=True))
            tl.store(last_ties + program * 2, num_blocks * num_blocks)
        return
    now = turn * tl.num_programs(1) + local
    if chunk == 0:
        tl.store(brackets + now * 2, low)
        tl.store(brackets + now * 2 + 1, high)
    low_bits = low + (high - low + SECTIONS) // (SECTIONS + 1) * (cut + 1)
    estimate += local * num_blocks * num_blocks
    mass = tl.zeros([SECTIONS, TILE], tl.float32)
    for row in range(chunk, num_blocks, CHUNKS):
        for start in range(0, row + 1, TILE):
            column = start + tl.arange(0, TILE)
            entry = tl.load(estimate + row * num_blocks + column, mask=column <= row, other=0.0)
            bits = entry.to(tl.int32, bitcast=True)
            mass += tl.where(bits[None, :] >= low_bits[:, None], entry[None, :], 0.0)
    tl.store(masses + (now * CHUNKS + chunk) * SECTIONS + cut, tl.sum(mass, 1))


@triton.jit
def _narrow(mass: tl.tensor, needed: tl.tensor, low: tl.tensor, high: tl.tensor, SECTIONS: tl.constexpr) -> tl.tensor:
    """Narrow the bracket of the threshold's bits by the masses from each cut on.

    Returns:
        The lowest bits from which on the mass is as much as needed, for all that is known, and the lowest known from
        which on it is less.
    """
    step = (high - low + SECTIONS) // (SECTIONS + 1)
    low += step * tl.sum((mass >= needed).to(tl.int32), 0)
    return low, tl.minimum(high, low + step)
