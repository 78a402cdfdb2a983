"""One attention call, with or without a mask, as estimators and kernels read it."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from .layout import count_blocks
from .masks.facts import MaskFacts

# How many scores are held at once, by device: what fits a CPU's cache, what fills a GPU.
SCORES_AT_ONCE = {"cpu": 2**20, "cuda": 2**26}


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionInputs:
    """The inputs of one attention call.

    Tokens that a mask hides from all, padding, *count* for nothing: pools leave them out, and no row looks at them.

    Attributes:
        query: (B, H, Q, D).
        key: (B, Hkv, K, D); H is a multiple of Hkv.
        scale: Factor on q.k.
        block_size: Tokens a block, of queries and of keys.
        grid: (B|1, H|1, num_q_blocks, num_k_blocks) bool, the blocks to score. Other blocks are either hidden by the
            mask, or computed in any case.
        facts: Of the mask; None is causal attention of a prompt to itself.
        softcap: Scores are softcap * tanh(scale * q.k / softcap); None is scale * q.k.
    """

    query: Tensor
    key: Tensor
    scale: float
    block_size: int
    grid: Tensor
    facts: MaskFacts | None = None
    softcap: float | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of block scores: (B, H, num_q_blocks, num_k_blocks)."""
        return (*self.query.shape[:2], *self.grid.shape[-2:])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of pools and shares: float32, or float64 for float64."""
        return torch.promote_types(self.query.dtype, torch.float32)

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype in which vectors are multiplied: on a GPU their own, for its matrix units."""
        return self.query.dtype if self.query.is_cuda else self.dtype

    @functools.cached_property
    def query_counts(self) -> Tensor:
        """(B|1, num_q_blocks, block_size) bool, the queries that count."""
        return self._list_tokens(self.query) if self.facts is None else self.facts.query_counts

    @functools.cached_property
    def key_counts(self) -> Tensor:
        """(B|1, num_k_blocks, block_size) bool, the keys that count."""
        return self._list_tokens(self.key) if self.facts is None else self.facts.key_counts

    def cap(self, scores: Tensor) -> Tensor:
        """Apply the softcap, in place, to scores that are scaled."""
        return apply_softcap(scores, self.softcap)

    def end_of_groups(self, tokens: int) -> Tensor:
        """Return the last query of each group of ``tokens`` queries of a block, (1, num_q_blocks, groups) int64."""
        ends = torch.arange(tokens - 1, self.grid.shape[-2] * self.block_size, tokens, device=self.grid.device)
        return ends.clamp(max=self.query.shape[2] - 1).view(1, self.grid.shape[-2], -1)

    def _list_tokens(self, x: Tensor) -> Tensor:
        """Return which places of the blocks hold a token, (1, num_blocks, block_size) bool."""
        num_blocks = count_blocks(x.shape[2], self.block_size)
        tokens = torch.arange(num_blocks * self.block_size, device=x.device)
        return (tokens < x.shape[2]).view(1, num_blocks, self.block_size)


def apply_softcap(scores: Tensor, softcap: float | None) -> Tensor:
    """Return softcap * tanh(scores / softcap), computed in place; None returns the scores."""
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)
