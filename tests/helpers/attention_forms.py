"""Attention in small sizes, and what it is matched as."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flexprefill_compile.passes.match.site import AttentionSite
from flexprefill_compile.report import Skipped

from .graphs import check_site, match_graphs

BATCH, HEADS, KV_HEADS, LENGTH, HEAD_DIM = 2, 4, 2, 40, 16
SCALE = HEAD_DIM**-0.5
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
ADDED = torch.zeros(LENGTH, LENGTH).masked_fill(~CAUSAL, -1e9)


def qkv(kv_heads: int = HEADS, key_length: int = LENGTH, **kwargs: Any) -> list[Tensor]:
    torch.manual_seed(0)
    query = torch.randn(BATCH, HEADS, LENGTH, HEAD_DIM, **kwargs)
    return [query, *(torch.randn(BATCH, kv_heads, key_length, HEAD_DIM, **kwargs) for _ in range(2))]


def match_one(call: Callable[..., Any], *inputs: Any, **kwargs: Any) -> AttentionSite:
    """Return the only site of a call, compared with what the call computed."""
    (match,), values = match_graphs(call, *inputs, **kwargs)
    return check_site(match, values)


def skip_one(call: Callable[..., Any], *inputs: Any) -> Skipped:
    (match,), _ = match_graphs(call, *inputs)
    assert isinstance(match, Skipped), match
    return match


def repeat_kv(x: Tensor, count: int = HEADS // KV_HEADS) -> Tensor:
    batch, num_heads, length, head_dim = x.shape
    x = x[:, :, None, :, :].expand(batch, num_heads, count, length, head_dim)
    return x.reshape(batch, num_heads * count, length, head_dim)
