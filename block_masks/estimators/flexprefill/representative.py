"""The attention of the representative queries, the last block of the prompt, streamed over the keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...attention_inputs import SCORES_AT_ONCE
from ...layout import sum_blocks


class RepresentativeAttention(NamedTuple):
    """The pooled attention of the representative queries; each tensor sums to 1 along its last axis.

    Attributes:
        columns: (B, H, num_blocks), mass of each key block.
        diagonals: (B, H, num_blocks), mass of each block diagonal; entry d is (query block - key block) = d.
    """

    columns: Tensor
    diagonals: Tensor


def compute_representative_attention(
    queries: Tensor, key: Tensor, scale: float, block_size: int
) -> RepresentativeAttention:
    """Pool softmax(Q^ K^T) of the last queries onto key blocks and block diagonals.

    The scores are made twice, a chunk of keys at a time: first for the softmax's normaliser, then for the masses.
    Memory peaks at four tensors of ``SCORES_AT_ONCE`` + B * H * R * R numbers (more where B * H * R * block_size is: a
    chunk is at least a block of keys) and two of (B, H, S).

    Args:
        queries: (B, H, R, D), the last R queries of the prompt, float32 or float64, the dtype of the computation.
        key: (B, Hkv, S, D), any float dtype.
        scale: Factor on the scores.
        block_size: Tokens a block.

    Source: FlexPrefill, Algorithm 3, with diagonals pooled onto blocks by their shares.
    """
    batch, heads, num_rows, head_dim = queries.shape
    num_kv_heads, length = key.shape[1:3]
    # Last query first: a row's distance to the end is its index, as sum_diagonals needs.
    rows = (queries.flip(-2) * scale).reshape(batch, num_kv_heads, -1, head_dim)
    chunk_tokens = max(block_size, SCORES_AT_ONCE[key.device.type] // (batch * heads * num_rows))
    row_positions = torch.arange(length - 1, length - 1 - num_rows, -1, device=key.device)

    def score_chunk(start: int) -> Tensor:
        chunk = key[:, :, start : start + chunk_tokens].to(rows.dtype)
        scores = (rows @ chunk.mT).view(batch, heads, num_rows, -1)
        stop = start + scores.shape[-1]
        if stop > length - num_rows:
            is_future = torch.arange(start, stop, device=key.device) > row_positions[:, None]
            scores.masked_fill_(is_future, -torch.inf)
        return scores

    starts = range(0, length, chunk_tokens)
    log_total = score_chunk(0).logsumexp(-1)
    for start in starts[1:]:
        log_total = torch.logaddexp(log_total, score_chunk(start).logsumexp(-1))

    columns = rows.new_empty(batch, heads, length)
    distances_to_end = rows.new_zeros(batch, heads, length + num_rows)
    for start in starts:
        mass = score_chunk(start).sub_(log_total.unsqueeze(-1)).exp_()
        stop = start + mass.shape[-1]
        columns[..., start:stop] = mass.sum(-2)
        distances_to_end[..., start : stop + num_rows - 1] += sum_diagonals(mass)

    offsets = distances_to_end[..., :length].flip(-1)
    return RepresentativeAttention(
        columns=sum_blocks(columns, block_size) / num_rows,
        diagonals=_pool_offsets(offsets, block_size) / num_rows,
    )


def _pool_offsets(offset_mass: Tensor, block_size: int) -> Tensor:
    """Pool mass per token offset onto block diagonals.

    A diagonal of offset o = query - key crosses block diagonals o // block_size and the next one, in shares
    (block_size - o % block_size) and (o % block_size) of block_size. What would cross beyond the last goes to the last.

    Args:
        offset_mass: (..., S), entry o is the mass at offset o.
        block_size: Tokens a block.

    Returns:
        (..., num_blocks), with the same sum.
    """
    offsets = torch.arange(offset_mass.shape[-1], device=offset_mass.device)
    share_of_next = (offsets % block_size).to(offset_mass.dtype) / block_size
    mass_of_next = offset_mass * share_of_next
    diagonals = sum_blocks(offset_mass - mass_of_next, block_size)
    next_diagonals = sum_blocks(mass_of_next, block_size)
    diagonals[..., 1:] += next_diagonals[..., :-1]
    diagonals[..., -1] += next_diagonals[..., -1]
    return diagonals


def sum_diagonals(mass: Tensor) -> Tensor:
    """Sum (..., R, C) along its anti-diagonals: entry t of the (..., R + C - 1) result holds row + column = t."""
    num_rows, num_columns = mass.shape[-2:]
    # Rows padded to R + C and read back in rows of R + C - 1: each is shifted right by one more than the last.
    width = num_rows + num_columns - 1
    padded = torch.nn.functional.pad(mass, (0, num_rows)).flatten(-2)
    shifted: Tensor = padded[..., : num_rows * width].unflatten(-1, (num_rows, width))
    return shifted.sum(-2)
