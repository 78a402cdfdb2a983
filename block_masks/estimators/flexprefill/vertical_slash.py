"""Algorithm 3: the key columns and the diagonals that the representative queries look at, extended to every query."""

from __future__ import annotations

import torch
from torch import Tensor

from ...gammas import Share
from ...segments import Segments
from ...select import select_cumulative
from .representative import RepresentativeAttention


def select_vertical_slash(attention: RepresentativeAttention, gamma: Share) -> tuple[Tensor, Tensor]:
    """Select the fewest key blocks, and the fewest block diagonals, that reach gamma each; join them.

    Returns:
        Selected blocks, (B, H, num_blocks, num_blocks) bool, and their scores for the budgets: the mass of the
        block's column or of its diagonal, whichever is more. Entries above the diagonal mean nothing.
        Source: FlexPrefill, Algorithm 3.
    """
    columns = select_cumulative(attention.columns, gamma).unsqueeze(-2)
    diagonals = _spread_diagonals(select_cumulative(attention.diagonals, gamma))
    score = torch.maximum(attention.columns.unsqueeze(-2), _spread_diagonals(attention.diagonals))
    return columns | diagonals, score


def select_masked_vertical_slash(
    attention: RepresentativeAttention, slots: Tensor, gamma: Share, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    """Select the same of each sequence under a mask.

    Args:
        attention: Columns (B, H, num_k_blocks) and diagonals (B, H, num_slots).
        slots: (B|1, num_q_blocks, num_k_blocks) int64, which entry of the diagonals is a block's.
        gamma: Share to reach, one number or (H, 1).
        segments: The blocks, and so the slots, of each packed sequence; None is one sequence a row of the batch.

    Returns:
        As ``select_vertical_slash``, (B, H, num_q_blocks, num_k_blocks); entries off the mask mean nothing.
    """

    def spread(diagonals: Tensor) -> Tensor:
        shape = (*diagonals.shape[:2], *slots.shape[-2:])
        rows = diagonals.unsqueeze(-2).expand(*shape[:3], -1)
        return rows.gather(-1, slots.unsqueeze(1).expand(shape))

    columns = select_cumulative(attention.columns, gamma, segments).unsqueeze(-2)
    diagonals = spread(select_cumulative(attention.diagonals, gamma, segments))
    score = torch.maximum(attention.columns.unsqueeze(-2), spread(attention.diagonals))
    return columns | diagonals, score


def _spread_diagonals(diagonals: Tensor) -> Tensor:
    """Write entry d of (..., num_blocks) to the blocks of diagonal d: (..., num_blocks, num_blocks)."""
    block = torch.arange(diagonals.shape[-1], device=diagonals.device)
    return diagonals[..., (block[:, None] - block).clamp(min=0)]
