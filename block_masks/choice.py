"""What every estimator ends in."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Choice(NamedTuple):
    """The blocks that an estimator wants, before floors, ceilings, and what is always computed.

    Attributes:
        selected: (B, H, num_q_blocks, num_k_blocks) bool; what it says off the grid means nothing.
        score: As ``selected``, how much a block matters within its row: for the budgets.
        is_finite: (B, H) bool, whether all that it computed is finite; a head where it isn't computes every block.
    """

    selected: Tensor
    score: Tensor
    is_finite: Tensor
