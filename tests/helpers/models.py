"""Small models and oracles that several test files share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OPTIONS: dict[str, Any] = {"block_size": 32, "min_budget": 0, "min_length": 64, "check_masks": True}


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


class SelfAttention(nn.Module):
    """What models do around attention: views of one projection, GQA, a pointwise consumer."""

    def __init__(self, num_heads: int = 4, num_kv_heads: int = 2, head_dim: int = 16) -> None:
        super().__init__()
        self.splits = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
        self.head_dim = head_dim
        self.project_in = nn.Linear(64, sum(self.splits))
        self.project_out = nn.Linear(num_heads * head_dim, 64)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.project_in(x).split(self.splits, dim=-1)
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        attended = causal_attention(query, key, value).transpose(1, 2).flatten(-2)
        return x + self.project_out(torch.relu(attended))


class TwoLayers(nn.Module):
    def __init__(self, head_dims: tuple[int, int] = (16, 16)) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SelfAttention(head_dim=head_dim) for head_dim in head_dims)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def attend_in_float64(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Masked softmax attention, written out: (B, H, S, D), keys (B, Hkv, S, D), mask (B, H, S, S) or less."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(group, dim=1) for x in (key, value))
    scores = query.double() @ key.mT / query.shape[-1] ** 0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()
