"""Algorithm 3: the key columns and the diagonals that the representative queries look at, extended to every query."""

from __future__ import annotations

import torch
from torch import Tensor

from flexprefill_compile.block_masks.representative import RepresentativeAttention
from flexprefill_compile.block_masks.select import select_cumulative


def select_vertical_slash(attention: RepresentativeAttention, gamma: float) -> tuple[Tensor, Tensor]:
    """Select the fewest key blocks, and the fewest block diagonals, that reach gamma each; join them.

    Returns:
        Selected blocks, (B, H, num_blocks, num_blocks) bool, and their scores for the budgets: the mass of the
        block's column or of its diagonal, whichever is more. Entries above the diagonal mean nothing.
        Source: FlexPrefill, Algorithm 3.
    """
    columns = select_cumulative(attention.columns, gamma).unsqueeze(-2)
    diagonals = spread_diagonals(select_cumulative(attention.diagonals, gamma))
    score = torch.maximum(attention.columns.unsqueeze(-2), spread_diagonals(attention.diagonals))
    return columns | diagonals, score


def spread_diagonals(diagonals: Tensor) -> Tensor:
    """Write entry d of (..., num_blocks) to the blocks of diagonal d: (..., num_blocks, num_blocks)."""
    block = torch.arange(diagonals.shape[-1], device=diagonals.device)
    return diagonals[..., (block[:, None] - block).clamp(min=0)]
