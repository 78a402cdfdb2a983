"""What both kernels of the shares do with pieces: where rows stand, and how masses add up."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place_rows(
    first_block: int,
    row: tl.tensor,
    length: int,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_TOKENS: tl.constexpr,
    IS_MIDDLE: tl.constexpr,
) -> tl.tensor:
    """Return the query up to which rows see, the middle or the last of their tokens, and how many tokens there are."""
    block_rows: tl.constexpr = BLOCK // ROW_TOKENS
    start = (first_block + row // (GROUP * block_rows)) * BLOCK + row % block_rows * ROW_TOKENS
    number = tl.maximum(tl.minimum(length - start, ROW_TOKENS), 0)
    position = start + number // 2
    if not IS_MIDDLE:
        position = start + number - 1
    return tl.minimum(position, length - 1), number


@triton.jit
def add_mass(largest: tl.tensor, total: tl.tensor, log_mass: tl.tensor) -> tl.tensor:
    """Add pieces to a running sum of masses, kept as the largest log and the sum over its power of 2."""
    new_largest = tl.maximum(largest, tl.max(log_mass, 1))
    total = total * tl.exp2(largest - new_largest) + tl.sum(tl.exp2(log_mass - new_largest[:, None]), 1)
    return new_largest, total
