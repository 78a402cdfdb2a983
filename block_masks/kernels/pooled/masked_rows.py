"""The Triton function that selects some rows of blocks under a mask, by their masses and kinds, and packs them."""

from __future__ import annotations

import triton
import triton.language as tl

from .masked_inputs import CANDIDATE, CERTAIN, POSSIBLE, REQUIRED
from .rows import choose_in_rows, keep_best


@triton.jit
def select_masked_rows(
    segment: tl.tensor,
    mask_row: tl.tensor,
    worst: tl.tensor,
    kinds: tl.tensor,
    last_rows: tl.tensor,
    gammas: tl.tensor,
    gamma: float,
    masses: tl.tensor,
    partial_counts: tl.tensor,
    partial_indices: tl.tensor,
    full_counts: tl.tensor,
    full_indices: tl.tensor,
    first_head: tl.tensor,
    first_gamma: tl.tensor,
    num_q_blocks: int,
    num_k_blocks: int,
    min_blocks: int,
    max_blocks: int,
    dense_last: int,
    last_rows_step: int,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    HAS_GAMMAS: tl.constexpr,
    HAS_CEILING: tl.constexpr,
) -> None:
    """Choose the blocks of AT_ONCE segments, and pack those that the mask may cut apart from those it leaves whole.

    Chosen by mass are blocks of which it is known what the mask hides, as ``choose_known_and_all_others`` has it. Of
    the others all are taken, before any with a mass. A row whose mass, or whose head, is not finite takes every
    possible block, whatever the ceiling.
    """
    is_there = segment < num_q_blocks * GROUP
    query_block = segment // GROUP
    entry = (first_head + segment % GROUP) * num_q_blocks + query_block
    block = tl.arange(0, NUM_BLOCKS)
    is_block = is_there[:, None] & (block < num_k_blocks)[None, :]
    kind = tl.load(kinds + (mask_row * num_k_blocks)[:, None] + block[None, :], mask=is_block, other=0).to(tl.int32)
    is_certain = (kind & CERTAIN) != 0
    is_required = (kind & REQUIRED) != 0
    is_candidate = (kind & CANDIDATE) != 0
    is_known = is_candidate & (is_certain | is_required)
    mass = tl.load(masses + (entry * num_k_blocks)[:, None] + block[None, :], mask=is_known, other=0.0)
    is_finite = tl.sum(mass, 1) + worst < float("inf")
    mass = tl.where(is_finite[:, None], mass, 0.0)

    optional = is_candidate & (is_required == 0)
    unknown = optional & (is_certain == 0)
    own_gamma = tl.full([AT_ONCE], gamma, tl.float32)
    if HAS_GAMMAS:
        own_gamma = tl.load(gammas + first_gamma + segment % GROUP)
    takes_all = own_gamma == 1
    if dense_last > 0:
        last_row = tl.load(last_rows + query_block * last_rows_step, mask=is_there, other=0)
        takes_all |= (query_block + 1) * BLOCK > last_row - dense_last + 1
    sought = tl.where(takes_all[:, None], 0.0, mass)
    num_missing = tl.maximum(min_blocks - tl.sum(unknown.to(tl.int32), 1), 0)
    selected = choose_in_rows(sought, optional & is_certain, own_gamma, num_missing)
    selected = (selected | unknown | takes_all[:, None]) & optional
    if HAS_CEILING:
        selected = keep_best(tl.where(unknown, float("inf"), mass), selected, max_blocks)
    selected |= is_required
    selected = tl.where(is_finite[:, None], selected, (kind & POSSIBLE) != 0)
    _pack_row(selected & (is_certain == 0), partial_counts, partial_indices, entry, is_there, num_k_blocks, NUM_BLOCKS)
    _pack_row(selected & is_certain, full_counts, full_indices, entry, is_there, num_k_blocks, NUM_BLOCKS)


@triton.jit
def _pack_row(
    selected: tl.tensor,
    counts: tl.tensor,
    indices: tl.tensor,
    entry: tl.tensor,
    is_there: tl.tensor,
    num_k_blocks: int,
    NUM_BLOCKS: tl.constexpr,
) -> None:
    """Write how many blocks each row selects, and their columns."""
    block = tl.arange(0, NUM_BLOCKS)
    kept = selected.to(tl.int32)
    count = tl.sum(kept, 1)
    tl.store(counts + entry, count, mask=is_there)
    # FlexAttention looks at the first index even where there is none.
    is_written = selected | ((count == 0)[:, None] & (block == 0)[None, :])
    slot = tl.maximum(tl.cumsum(kept, 1) - 1, 0)
    places = (entry * num_k_blocks)[:, None] + slot
    tl.store(indices + places, tl.broadcast_to(block[None, :], places.shape), mask=is_written & is_there[:, None])
