"""What the selection needs to know of a mask, computed once for all layers that share it.

A key is *valid* if its own query sees it, in any head: padding is not. A *sequence* is a row of the batch, or, where
prompts are packed, a stretch of it: one begins at each valid key whose query does not see the key before it. Blocks
belong to the sequence of their last valid token; only the tokens of that sequence *count*.

Everything here is plain torch code of static shapes, made to be traced into a graph: O(block_size * S) work. Between
steps that read each other by index stands a ``realize``: inductor would fuse them into index formulas that take it
minutes to simplify.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layout import AttentionSizes, count_blocks, realize
from .intervals import BlockBounds


class MaskFacts(NamedTuple):
    """What the selection knows of a mask. B and H are 1 where the mask does not depend on them.

    Where one sequence fills a row of the batch, N is 1; in packed rows it is num_k_blocks, and what is said of a
    sequence stands at each of its blocks.

    Attributes:
        certain: (B, H, num_q_blocks, num_k_blocks) bool, the blocks whose every pair is attended.
        possible: As ``certain``, the blocks that are not proven empty.
        required: As ``certain``, the possible blocks that are always computed: those on the positions of their own
            queries, those of a sequence's first valid key, and those that hold tokens of more than one sequence. In a
            row of the batch without a valid key all are: what such a mask means is not known.
        rows: (B, N, block_size) int64, the representative queries of a sequence: its last valid row and those before
            it, last first; -1 fills up.
        row_mask: (B, H, num_k_blocks, block_size, block_size) bool, which counted keys of a block they see.
        key_counts: (B, num_k_blocks, block_size) bool, the keys that count.
        query_counts: (B, num_q_blocks, block_size) bool, the queries that count.
        first_block: (B, N) int64, the key block of the first valid key of a sequence.
        last_block: (B, N) int64, the block of its last valid row, counted as the diagonals are, see ``block_offset``.
        block_offset: () int64, offset / block_size rounded up. Block (i, j) is on diagonal i + block_offset - j.
        offset: () int64, the position of the first query among the keys.
    """

    certain: Tensor
    possible: Tensor
    required: Tensor
    rows: Tensor
    row_mask: Tensor
    key_counts: Tensor
    query_counts: Tensor
    first_block: Tensor
    last_block: Tensor
    block_offset: Tensor
    offset: Tensor


class _Tokens(NamedTuple):
    """The keys or the queries in blocks, (B, num_blocks, block_size).

    Attributes:
        sequence: int64, the number of the sequence of each valid token, -1 for the others.
        is_counted: bool, whether that is the sequence of the block.
    """

    sequence: Tensor
    is_counted: Tensor


def describe_mask(
    mask_mod: Callable[..., Tensor],
    captures: Sequence[Any],
    sizes: AttentionSizes,
    bounds: BlockBounds,
    offset: int | Tensor,
    is_packed: bool,
    block_size: int,
) -> MaskFacts:
    """Find the sequences of a mask and their representative queries.

    Args:
        mask_mod: As FlexAttention's, on index tensors that broadcast; it is only called within the sizes.
        captures: Its arguments after the four indices.
        sizes: Of the attention calls.
        bounds: Of the mask, on the grid of blocks.
        offset: The position of the first query among the keys: an int, a SymInt or an integer tensor of no dimensions.
        is_packed: Whether a row of the batch may hold several sequences; then offset must be 0 and the lengths equal.
        block_size: Tokens a block.
    """
    batch, heads, num_q_blocks, num_k_blocks = bounds.possible.shape
    device = bounds.possible.device
    key_positions = _list_positions(num_k_blocks, block_size, device)
    query_positions = _list_positions(num_q_blocks, block_size, device)

    def see_one(query_index: Tensor, key_index: Tensor) -> Tensor:
        batch_index = torch.arange(batch, device=device).view(-1, 1, 1, 1)
        head_index = torch.arange(heads, device=device).view(-1, 1, 1)
        visible = mask_mod(batch_index, head_index, query_index, key_index, *captures)
        return visible.expand(batch, heads, num_k_blocks, block_size).any(1)

    # Realized: of clamped positions that index a capture, inductor's C++ may check the bounds before it computes them.
    own_query = realize((key_positions - offset).clamp(0, sizes.query_length - 1))
    key_index = realize(key_positions.clamp(max=sizes.key_length - 1))
    is_valid = see_one(own_query, key_index) & (key_positions < sizes.key_length)
    sequence = torch.zeros_like(is_valid, dtype=torch.int64)
    if is_packed:
        sees_previous = see_one(own_query, (key_index - 1).clamp(min=0))
        sequence = realize(is_valid & ~sees_previous).flatten(1).cumsum(1).view_as(sequence)
    sequence = realize(torch.where(is_valid, sequence, -1))
    # A block without a valid token goes on with the sequence before it.
    of_block = sequence.amax(-1).cummax(1).values if is_packed else sequence.amax((1, 2)).unsqueeze(-1)
    of_block = realize(of_block)
    keys = _Tokens(sequence, realize((sequence >= 0) & (sequence == of_block.unsqueeze(-1))))
    queries = _take_queries(keys, query_positions, offset, sizes.query_length)

    last_row = _find_last_rows(queries, query_positions, of_block, is_packed)
    rows = realize(_list_rows(queries, last_row, of_block, block_size))
    batch_index, head_index, row_index, key_index = representative_indices(rows, batch, heads, sizes.key_length)
    visible = mask_mod(batch_index, head_index, row_index, key_index, *captures)
    row_mask = visible.expand(batch, heads, num_k_blocks, block_size, block_size)
    row_mask = row_mask & (rows >= 0)[:, None, :, :, None] & keys.is_counted[:, None, :, None]

    first_block, block_offset = _find_first_blocks(keys, of_block, is_packed), _round_up(offset, block_size, device)
    return MaskFacts(
        certain=bounds.certain,
        possible=bounds.possible,
        required=bounds.possible & _require(keys, queries, first_block, offset).unsqueeze(1),
        rows=rows,
        row_mask=row_mask,
        key_counts=keys.is_counted,
        query_counts=queries.is_counted,
        first_block=first_block,
        last_block=_find_last_blocks(last_row // block_size + block_offset, first_block, is_packed),
        block_offset=block_offset,
        offset=_as_scalar(offset, device),
    )


def representative_indices(
    rows: Tensor, batch: int, heads: int, key_length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what a mask_mod or score_mod takes to be evaluated for the representative queries and all keys.

    Args:
        rows: Of the ``MaskFacts``; where there is none, the first query stands in.
        batch: For how many rows of the batch, 1 if all are alike.
        heads: For how many heads, likewise.
        key_length: Beyond the last key, that one stands in.

    Returns:
        Batch, head, query and key index, which broadcast to (batch, heads, num_k_blocks, block_size, block_size).
    """
    block_size = rows.shape[-1]
    num_k_blocks = count_blocks(key_length, block_size)
    keys = realize(_list_positions(num_k_blocks, block_size, rows.device).clamp(max=key_length - 1))
    return (
        torch.arange(batch, device=rows.device).view(-1, 1, 1, 1, 1),
        torch.arange(heads, device=rows.device).view(-1, 1, 1, 1),
        rows.clamp(min=0)[:, None, :, :, None],
        keys.unsqueeze(1),
    )


def _list_positions(num_blocks: int, block_size: int, device: torch.device) -> Tensor:
    """Return the positions of the tokens of each block, (num_blocks, block_size); a view of all would add guards."""
    first = torch.arange(num_blocks, device=device).unsqueeze(-1) * block_size
    return first + torch.arange(block_size, device=device)


def _take_queries(keys: _Tokens, positions: Tensor, offset: int | Tensor, length: int) -> _Tokens:
    """Return the queries: each has the sequence of the key at its position."""
    exists = positions < length
    sequence, is_counted = (x.flatten(1) for x in keys)
    at = (positions + offset).clamp(max=sequence.shape[1] - 1)
    return _Tokens(realize(torch.where(exists, sequence[:, at], -1)), realize(exists & is_counted[:, at]))


def _find_last_rows(queries: _Tokens, positions: Tensor, of_block: Tensor, is_packed: bool) -> Tensor:
    """Return the last valid row of each sequence, (B, N), -1 if it has none."""
    rows = torch.where(queries.sequence >= 0, positions, -1).flatten(1)
    if not is_packed:
        return realize(rows.amax(1, keepdim=True))
    by_sequence = rows.new_full((rows.shape[0], rows.shape[1] + 2), -1)
    by_sequence = by_sequence.scatter_reduce(1, queries.sequence.flatten(1) + 1, rows, "amax")
    return realize(by_sequence.gather(1, of_block + 1))


def _list_rows(queries: _Tokens, last_row: Tensor, of_block: Tensor, block_size: int) -> Tensor:
    rows = last_row.unsqueeze(-1) - torch.arange(block_size, device=last_row.device)
    sequence = queries.sequence.flatten(1).gather(1, rows.clamp(min=0).flatten(1)).view_as(rows)
    return torch.where((rows >= 0) & (sequence == of_block.unsqueeze(-1)), rows, -1)


def _find_first_blocks(keys: _Tokens, of_block: Tensor, is_packed: bool) -> Tensor:
    """Return the first block of the sequence of each block, or of the one sequence, (B, N)."""
    if not is_packed:
        return keys.is_counted.any(-1).int().argmax(1, keepdim=True)
    block = torch.arange(of_block.shape[1], device=of_block.device)
    is_first = torch.nn.functional.pad(of_block.diff(dim=1) > 0, (1, 0), value=True)
    return torch.where(is_first, block, 0).cummax(1).values


def _find_last_blocks(of_last_row: Tensor, first_block: Tensor, is_packed: bool) -> Tensor:
    """Return the last block of each sequence, (B, N), which in packed rows may not reach into the next one's blocks."""
    if is_packed:
        num_blocks = first_block.shape[1]
        block = torch.arange(num_blocks, device=first_block.device)
        is_last = torch.nn.functional.pad(first_block.diff(dim=1) > 0, (0, 1), value=True)
        end = torch.where(is_last, block, num_blocks).flip(1).cummin(1).values.flip(1)
        of_last_row = of_last_row.minimum(end)
    return of_last_row.maximum(first_block)


def _require(keys: _Tokens, queries: _Tokens, first_block: Tensor, offset: int | Tensor) -> Tensor:
    """Return the blocks that are always computed if they are possible, (B, num_q_blocks, num_k_blocks)."""
    block_size = keys.is_counted.shape[-1]
    query_block = torch.arange(queries.is_counted.shape[1], device=first_block.device).unsqueeze(-1)
    key_block = torch.arange(keys.is_counted.shape[1], device=first_block.device)
    first_position = query_block * block_size + offset
    is_diagonal = (key_block >= first_position // block_size) & (
        key_block <= (first_position + block_size - 1) // block_size
    )
    is_first = key_block == first_block.unsqueeze(-1)
    shared_queries, shared_keys = (((x.sequence >= 0) & ~x.is_counted).any(-1) for x in (queries, keys))
    is_unknown = ~keys.is_counted.flatten(1).any(1)[:, None, None]
    return is_diagonal | is_first | shared_queries.unsqueeze(-1) | shared_keys.unsqueeze(-2) | is_unknown


def _round_up(offset: int | Tensor, block_size: int, device: torch.device) -> Tensor:
    return _as_scalar(count_blocks(offset, block_size), device)


def _as_scalar(number: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(number, Tensor):
        return number.long()
    return torch.full((), number, dtype=torch.int64, device=device)
