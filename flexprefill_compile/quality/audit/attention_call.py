"""What one attention call over selected blocks kept and lost, exact on some of its rows.

A sampled row's attention is computed over all its keys, in float32, a few rows of one key head at a time:

    recall = the attention that falls into the selected blocks
    error  = |output - dense output| / |dense output|, over the sampled rows of a head

The output is what the compiled call gave, so the error is that of what runs, rounding included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flexprefill_compile.block_masks.attention_inputs import SCORES_AT_ONCE
from flexprefill_compile.block_masks.layout import compute_density, sum_blocks, unpack_blocks
from flexprefill_compile.block_masks.observed_attention import ObservedAttention


@dataclasses.dataclass(frozen=True)
class BlockPicture:
    """Where the sampled rows of one head look, and which blocks they compute.

    Attributes:
        name: The attention call.
        head: Its query head, in the first prompt of the batch.
        rows: (R,) int64, the sampled rows.
        attention: (R, num_k_blocks), their true attention by key block; each row that sees keys sums to 1.
        is_selected: (R, num_k_blocks) bool, the blocks computed.
        block_size: Tokens a block.
    """

    name: str
    head: int
    rows: Tensor
    attention: Tensor
    is_selected: Tensor
    block_size: int


class CallMeasurement(NamedTuple):
    """Of one attention call; all on the CPU.

    Attributes:
        recall: (B, H, R), share of the attention of each sampled row that falls into the selected blocks.
        error: (H,), of the output on the counted rows.
        density: (H,), share computed of the blocks that dense attention computes, mean over prompts.
        is_counted: (B, R) bool, false for rows that are padding or see no key.
        picture: Of the head of least recall, in the first prompt.
    """

    recall: Tensor
    error: Tensor
    density: Tensor
    is_counted: Tensor
    picture: BlockPicture


class _Rows(NamedTuple):
    """The sampled rows of one key head in one prompt.

    Attributes:
        recall: (H / Hkv, R).
        squares: (H / Hkv, R, 2), squared norms of the output's error and of the dense output.
        attention: (H / Hkv, R, num_k_blocks).
        sees: (H / Hkv, R) bool, whether the row sees any key.
    """

    recall: Tensor
    squares: Tensor
    attention: Tensor
    sees: Tensor


def measure_call(call: ObservedAttention, block_size: int) -> CallMeasurement:
    """Measure one attention call, O(R x Skv) work and memory of a few rows. Waits for the device.

    Args:
        call: What was observed.
        block_size: Tokens to a side of its blocks.
    """
    batch, heads, _, _ = call.query.shape
    kv_heads, key_length = call.key.shape[1:3]
    row_blocks = call.rows // block_size
    num_k_blocks = -(-key_length // block_size)
    counts, columns, full_counts, full_columns = (table[:, :, row_blocks] for table in call.tables)
    selected = unpack_blocks(counts, columns, num_k_blocks) | unpack_blocks(full_counts, full_columns, num_k_blocks)
    measured = [_measure_rows(call, selected, b, h, block_size) for b in range(batch) for h in range(kv_heads)]
    recall, squares, attention, sees = (
        torch.stack(parts).reshape(batch, heads, *parts[0].shape[1:]) for parts in zip(*measured, strict=True)
    )
    is_counted = sees.any(1)
    if call.facts is not None:
        is_counted = is_counted & call.facts.query_counts.flatten(1)[:, call.rows]
    totals = (squares * is_counted[:, None, :, None]).sum((0, 2))
    worst = _find_worst_head(recall, is_counted)
    return CallMeasurement(
        recall=recall.cpu(),
        error=(totals[:, 0] / totals[:, 1]).sqrt().cpu(),
        density=compute_density(call.tables, None if call.facts is None else call.facts.possible).mean(0).cpu(),
        is_counted=is_counted.cpu(),
        picture=BlockPicture(
            call.name, worst, call.rows.cpu(), attention[0, worst].cpu(), selected[0, worst].cpu(), block_size
        ),
    )


def _find_worst_head(recall: Tensor, is_counted: Tensor) -> int:
    """Return the head of least mean recall: (B, H, R) and (B, R)."""
    return int((recall * is_counted.unsqueeze(1)).sum((0, 2)).argmin())


def _measure_rows(call: ObservedAttention, selected: Tensor, prompt: int, kv_head: int, block_size: int) -> _Rows:
    """Measure the sampled rows of the query heads that share a key head."""
    group = call.query.shape[1] // call.key.shape[1]
    heads = slice(kv_head * group, (kv_head + 1) * group)
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    key, value = (x[prompt, kv_head].to(dtype) for x in (call.key, call.value))
    parts = []
    for rows, positions in _split_rows(call, group):
        query, output = (x[prompt, heads, positions].to(dtype) for x in (call.query, call.output))
        visible = _look(call, prompt, heads, rows, positions)
        scores = call.rule.cap(query @ key.mT * call.rule.scale)
        if call.row_bias is not None:
            scores = scores + _take(call.row_bias, prompt, heads, rows)
        sees = visible.any(-1).expand(scores.shape[:-1])
        # A row that sees no key gives zero.
        attention = scores.masked_fill(~visible, -torch.inf).softmax(-1).masked_fill(~sees.unsqueeze(-1), 0)
        by_block = sum_blocks(attention, block_size)
        dense = attention @ value
        squares = torch.stack([(output - dense).square().sum(-1), dense.square().sum(-1)], dim=-1)
        recall = (by_block * selected[prompt, heads, rows]).sum(-1).clamp(max=1)
        parts.append(_Rows(recall, squares, by_block, sees))
    return _Rows(*(torch.cat(columns, dim=1) for columns in zip(*parts, strict=True)))


def _split_rows(call: ObservedAttention, group: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the sampled rows, as many at a time as may hold their scores: which of them, and their positions."""
    at_once = max(1, SCORES_AT_ONCE[call.query.device.type] // (group * call.key.shape[2]))
    for start in range(0, len(call.rows), at_once):
        rows = slice(start, start + at_once)
        yield rows, call.rows[rows]


def _look(call: ObservedAttention, prompt: int, heads: slice, rows: slice, positions: Tensor) -> Tensor:
    """Return which keys some sampled rows see in dense attention: (H / Hkv or 1, rows, Skv) bool."""
    key_length = call.key.shape[2]
    if call.visible is None or call.facts is None:
        return (torch.arange(key_length, device=positions.device) <= positions.unsqueeze(-1)).unsqueeze(0)
    visible = _take(call.visible, prompt, heads, rows)
    # The model's own block mask may leave out more than its mask_mod says.
    block_size = call.facts.key_counts.shape[-1]
    possible = _take(call.facts.possible, prompt, heads, slice(None))[:, positions // block_size]
    return visible & possible.repeat_interleave(block_size, dim=-1)[..., :key_length]


def _take(x: Tensor, prompt: int, heads: slice, rows: slice) -> Tensor:
    """Cut one prompt, some heads and some rows out of what broadcasts to (B, H, R, N)."""
    x = x[(None,) * (4 - x.dim())]
    x = x[prompt if x.shape[0] > 1 else 0]
    x = x[heads] if x.shape[0] > 1 else x
    return x[:, rows] if x.shape[1] > 1 else x
