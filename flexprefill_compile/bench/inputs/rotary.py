"""Structured heads under rotary positions: a sink, stripes, topics, a window and a far diagonal."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ROTARY_BASE = 500_000.0
_TOPIC_TOKENS = 512
_NUM_STRIPES = 16


def create_rotary_inputs(
    heads: int, kv_heads: int, length: int, head_dim: int, device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Make heads that take turns at a sink, stripes, topics, a window and a far diagonal, under rotary positions.

    What a key holds stands in the slow half of the rotations, which leaves it in place over the prompt; the fast half
    carries one vector in every key, so that queries find a distance by it. A head's peak score grows with log(length),
    as it must to stand out among more keys.
    """
    generator = torch.Generator(device).manual_seed(0)
    half = head_dim // 2
    is_slow = (torch.arange(head_dim, device=device) % half) >= half // 2

    def unit(*shape: int, slow: bool) -> Tensor:
        vectors: Tensor = torch.randn(*shape, head_dim, generator=generator, device=device) * (is_slow == slow)
        return torch.nn.functional.normalize(vectors, dim=-1)

    sink, stripe, place = unit(slow=True), unit(slow=True), unit(slow=False)
    topics = unit(length // _TOPIC_TOKENS + 1, slow=True).repeat_interleave(_TOPIC_TOKENS, 0)[:length]
    position = torch.arange(length, device=device)
    key = 0.2 * unit(1, kv_heads, length, slow=True) + topics + place
    key[:, :, 0] += sink
    key[:, :, torch.randint(0, length, (_NUM_STRIPES,), generator=generator, device=device)] += stripe

    strength = (2 + math.log(length)) * math.sqrt(head_dim)
    offset = length // 3
    query = torch.empty(1, heads, length, head_dim, device=device, dtype=dtype)
    for head in range(heads):
        wanted = (sink, stripe, topics, place, place)[head % 5]
        at = (position - offset).clamp(min=0) if head % 5 == 4 else position
        noise = torch.randn(length, head_dim, generator=generator, device=device)
        query[0, head] = rotate(strength * wanted + noise, at).to(dtype)
    value = torch.randn(1, kv_heads, length, head_dim, generator=generator, device=device)
    return query, rotate(key, position).to(dtype), value.to(dtype)


def rotate(x: Tensor, position: Tensor) -> Tensor:
    """Apply rotary position embedding, dimension i paired with i + D / 2: (..., S, D) float32, (S,) integers."""
    half = x.shape[-1] // 2
    frequency = _ROTARY_BASE ** (-torch.arange(half, device=x.device) / half)
    angle = position.unsqueeze(-1) * frequency
    first, second = x[..., :half], x[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
