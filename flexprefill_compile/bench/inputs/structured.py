"""Structured heads without positions: what ``flexprefill tune`` and most rows of the benchmark attend over."""

from __future__ import annotations

import torch
from torch import Tensor


def create_structured_inputs(
    heads: int, kv_heads: int, length: int, head_dim: int, device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Make queries and keys with a sink, a few heavy columns, and topics that last some hundred tokens.

    Returns:
        query (1, heads, length, head_dim), key and value (1, kv_heads, length, head_dim).
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    common = normal(head_dim)
    common /= common.norm()
    topics = normal(length // 512 + 1, head_dim).repeat_interleave(512, 0)[:length]
    query = normal(1, heads, length, head_dim) + 4 * common * head_dim**0.25 + topics
    key = normal(1, kv_heads, length, head_dim) + topics
    heavy = torch.randint(0, length, (16,), generator=generator, device=device)
    heavy[:2] = torch.arange(2, device=device)
    key[:, :, heavy] += 8 * common * head_dim**0.25
    return query.to(dtype), key.to(dtype), normal(1, kv_heads, length, head_dim).to(dtype)
