"""The attention of the representative queries of each sequence under a mask, streamed over the keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...attention_inputs import SCORES_AT_ONCE, apply_softcap
from ...layout import take_blocks
from ...masks.facts import MaskFacts
from ...segments import Segments, logsumexp_segments, sum_segments
from .representative import RepresentativeAttention, sum_diagonals


class ScoreRule(NamedTuple):
    """The formula of a score: softcap * tanh(scale * q.k / softcap) + bias.

    Attributes:
        scale: Factor on q.k.
        softcap: None for none.
        bias: (B|1, H|1, num_k_blocks, block_size, block_size) for the representative queries, as their row_mask; None
            is none.
    """

    scale: float
    softcap: float | None = None
    bias: Tensor | None = None

    def cap(self, scores: Tensor) -> Tensor:
        """Apply the softcap, in place, to scores that are scaled."""
        return apply_softcap(scores, self.softcap)


class _MaskedAttention(NamedTuple):
    """The pooled attention of each sequence's representative queries.

    Attributes:
        pooled: ``columns`` (B, H, num_k_blocks) and ``diagonals`` (B, H, num_slots), of which slot first_block + d is
            diagonal d of a sequence. Each sums to 1 over a sequence that has representative queries.
        is_seen: (B|1, H|1, num_k_blocks) bool, the blocks of which they see any key.
        is_finite: (B, H) bool, whether all their scores are.
    """

    pooled: RepresentativeAttention
    is_seen: Tensor
    is_finite: Tensor


def compute_masked_attention(
    query: Tensor, key: Tensor, facts: MaskFacts, rule: ScoreRule, segments: Segments | None, dtype: torch.dtype
) -> _MaskedAttention:
    """Pool softmax(Q^ K^T) of each sequence onto its key blocks and block diagonals.

    As in ``compute_representative_attention``, the scores are made twice, a chunk of key blocks at a time. Memory peaks
    at four tensors of a chunk, ``SCORES_AT_ONCE`` numbers or a block of every head, and four of (B, H, S).

    Args:
        query: (B, H, Q, D).
        key: (B, Hkv, K, D).
        facts: Of the mask.
        rule: From q.k to scores.
        segments: The blocks of each packed sequence, (B|1, 1, num_k_blocks); None is one sequence a row of the batch.
        dtype: The dtype of the computation.

    Source: FlexPrefill, Algorithm 3, with diagonals pooled onto blocks by their shares.
    """
    heads = (key.shape[1], -1)
    log_sums = torch.cat(
        [scores.logsumexp(-1).flatten(1, 2) for _, scores in _stream_scores(query, key, facts, rule, dtype)], dim=2
    )
    row_sees = facts.row_mask.any(-1)
    segments_of_rows = None if segments is None else Segments(segments.first.unsqueeze(1), segments.last.unsqueeze(1))
    log_total = logsumexp_segments(log_sums.mT, segments_of_rows).mT
    # The scores of a row that sees nothing stay -inf.
    log_total = log_total.masked_fill(log_total == -torch.inf, 0).expand_as(log_sums).unflatten(1, heads)

    columns, anti_diagonals = [], []
    for blocks, scores in _stream_scores(query, key, facts, rule, dtype):
        mass = scores.sub_(log_total[..., blocks, :].unsqueeze(-1)).exp_()
        columns.append(mass.sum((-2, -1)).flatten(1, 2))
        anti_diagonals.append(sum_diagonals(mass).flatten(1, 2))
    diagonals = _pool_anti_diagonals(torch.cat(anti_diagonals, dim=2), facts, is_packed=segments is not None)
    return _MaskedAttention(
        RepresentativeAttention(_normalise(torch.cat(columns, dim=2), segments), _normalise(diagonals, segments)),
        is_seen=row_sees.any(-1),
        is_finite=(log_sums.isfinite() | ~row_sees).all(-1).all(-1),
    )


def average_rows(query: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Average the representative queries of each sequence: (B, H, Q, D) and (B|1, N, R) to (B, H, N, D)."""
    at_once = max(1, SCORES_AT_ONCE[query.device.type] // (query[:, :, 0].numel() * rows.shape[-1]))
    means = []
    for part in rows.split(at_once, dim=1):
        weights = (part >= 0).to(dtype)
        weights = (weights / weights.sum(-1, keepdim=True).clamp(min=1))[:, None, ..., None]
        means.append((_gather_rows(query, part, dtype) * weights).sum(-2))
    return torch.cat(means, dim=2)


def _stream_scores(
    query: Tensor, key: Tensor, facts: MaskFacts, rule: ScoreRule, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of key blocks with their scores, (B, Hkv, H / Hkv, blocks, R, block_size), -inf off the mask."""
    batch, kv_heads, _, head_dim = key.shape
    group = query.shape[1] // kv_heads
    num_blocks, num_rows, block_size = facts.row_mask.shape[2:]
    at_once = max(1, SCORES_AT_ONCE[key.device.type] // (batch * query.shape[1] * num_rows * block_size))
    is_packed = facts.rows.shape[1] > 1

    def take(x: Tensor, blocks: slice) -> Tensor:
        x = x[:, :, blocks]
        return x.unflatten(1, (kv_heads, group)) if x.shape[1] > 1 else x.unsqueeze(2)

    def prepare(rows: Tensor) -> Tensor:
        gathered: Tensor = _gather_rows(query, rows, dtype).mul_(rule.scale).unflatten(1, (kv_heads, group))
        return gathered.transpose(2, 3).reshape(batch, kv_heads, -1, group * num_rows, head_dim)

    rows = prepare(facts.rows) if not is_packed else None
    for start in range(0, num_blocks, at_once):
        blocks = slice(start, start + at_once)
        queries = prepare(facts.rows[:, blocks]) if rows is None else rows
        # Key blocks that share their queries make one product: (.., N, H / Hkv * R, D) by (.., N, tokens, D).
        keys = take_blocks(key, start, at_once, block_size).to(dtype)
        products = queries @ keys.reshape(batch, kv_heads, queries.shape[2], -1, head_dim).mT
        products = products.view(batch, kv_heads, queries.shape[2], group, num_rows, -1, block_size)
        scores = rule.cap(products.permute(0, 1, 3, 2, 5, 4, 6).flatten(3, 4))
        if rule.bias is not None:
            scores += take(rule.bias, blocks)
        yield blocks, scores.masked_fill_(~take(facts.row_mask, blocks), -torch.inf)


def _gather_rows(query: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy of the rows, (B, H, N, R, D), any where there is none."""
    batch, heads, _, head_dim = query.shape
    index = rows.clamp(min=0).flatten(1)[:, None, :, None].expand(batch, heads, -1, head_dim)
    gathered: Tensor = query.gather(2, index).to(dtype).unflatten(2, rows.shape[1:])
    return gathered


def _pool_anti_diagonals(mass: Tensor, facts: MaskFacts, *, is_packed: bool) -> Tensor:
    """Pool the anti-diagonals of each key block onto the block diagonals of its sequence, by shares.

    The last query is ``remainder`` rows into its block, on diagonal ``last`` - j of key block j. Anti-diagonal k lies
    remainder - k tokens past the middle of that block diagonal, so the diagonals of which it takes a share are at most
    one above and two below. What would go beyond a sequence's last diagonal goes to the last.

    Args:
        mass: (B, H, num_k_blocks, R + block_size - 1); entry k is the mass of row + key = k, the last row first.
        facts: Of the mask.
        is_packed: Whether the slots of a sequence are its own blocks only.

    Returns:
        (B, H, num_slots): num_k_blocks slots, and one more where the blocks of queries and keys may be shifted.
    """
    batch, heads, num_blocks, num_entries = mass.shape
    block_size = facts.key_counts.shape[-1]
    device = mass.device
    last_row = facts.rows[..., :1]
    steps = torch.arange(-1, 3, device=device)
    past_middle = last_row % block_size - torch.arange(num_entries, device=device)
    distance = (past_middle.unsqueeze(-1) + steps * block_size).abs()
    shares = (1 - distance.to(mass.dtype) / block_size).clamp(min=0)
    by_diagonal = (mass.unsqueeze(-2) @ shares.unsqueeze(1)).squeeze(-2) if is_packed else mass @ shares

    block = torch.arange(num_blocks, device=device).unsqueeze(-1)
    diagonal = last_row.div(block_size, rounding_mode="floor") + facts.block_offset - block - steps
    slots = clamp_diagonals(diagonal, facts.first_block.unsqueeze(-1), facts.last_block.unsqueeze(-1))
    # float64, in which the order of the additions, which a GPU leaves open, hardly ever shows.
    pooled = mass.new_zeros(batch, heads, num_blocks + (not is_packed), dtype=torch.float64)
    index = slots.flatten(1).unsqueeze(1).expand(batch, heads, -1)
    return pooled.scatter_add_(-1, index, by_diagonal.flatten(2).double()).to(mass.dtype)


def clamp_diagonals(diagonal: Tensor, first_block: Tensor, last_block: Tensor) -> Tensor:
    """Return the slot of each block diagonal; what is above the first one, or beyond the last, counts as that."""
    return (first_block + diagonal.clamp(min=0)).minimum(last_block)


def _normalise(mass: Tensor, segments: Segments | None) -> Tensor:
    """Make each segment sum to 1, or to 0 where it does."""
    total = sum_segments(mass, segments)
    return mass / total.masked_fill(total == 0, 1)
