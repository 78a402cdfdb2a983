"""What a mask is known to do to each block of the grid."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class BlockBounds(NamedTuple):
    """What is known of each block; (B|1, H|1, num_q_blocks, num_k_blocks) bool.

    Attributes:
        certain: Every pair of the block is attended.
        possible: The block is not proven empty.
    """

    certain: Tensor
    possible: Tensor
