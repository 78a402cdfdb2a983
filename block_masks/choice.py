"""The result of every estimator."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Choice(NamedTuple):
    """The blocks that an estimator chooses, before budgets and the blocks that are always computed.

    Attributes:
        selected: (B, H, num_q_blocks, num_k_blocks) bool; entries off the grid are ignored.
        score: As ``selected``, how much a block matters within its row; the budgets keep the best.
        is_finite: (B, H) bool, whether everything computed is finite; other heads compute every block.
    """

    selected: Tensor
    score: Tensor
    is_finite: Tensor
