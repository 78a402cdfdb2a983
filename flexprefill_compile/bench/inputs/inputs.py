"""What the benchmark attends over: noise, structures with and without rotary positions, and a real model's tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .real_inputs import create_real_inputs
from .workloads import create_structured_inputs

ROTARY_BASE = 500_000.0
TOPIC_TOKENS = 512
NUM_STRIPES = 16


def create_inputs(
    kind: str, heads: Sequence[int], length: int, head_dim: int, device: str, dtype: torch.dtype, model: Path | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Make query (1, H, S, D), key and value (1, Hkv, S, D) of a kind: structured, random, rotary or real.

    Args:
        kind: Which.
        heads: H and Hkv; "real" ones have the model's.
        length: In tokens.
        head_dim: D; "real" ones have the model's.
        device: Where.
        dtype: Of all three.
        model: For "real" ones, a Hugging Face folder or GGUF file; None is SmolLM2.

    Raises:
        UsageError: No such model, or it takes fewer tokens.
    """
    if kind == "real":
        return create_real_inputs(model, length, device, dtype)
    if kind == "rotary":
        return create_rotary_inputs(heads[0], heads[1], length, head_dim, device, dtype)
    if kind == "structured":
        return create_structured_inputs(heads[0], heads[1], length, head_dim, device, dtype)
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(1, count, length, head_dim, generator=generator, device=device).to(dtype)
        for count in (heads[0], heads[1], heads[1])
    )
    return query, key, value


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
    topics = unit(length // TOPIC_TOKENS + 1, slow=True).repeat_interleave(TOPIC_TOKENS, 0)[:length]
    position = torch.arange(length, device=device)
    key = 0.2 * unit(1, kv_heads, length, slow=True) + topics + place
    key[:, :, 0] += sink
    key[:, :, torch.randint(0, length, (NUM_STRIPES,), generator=generator, device=device)] += stripe

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
    frequency = ROTARY_BASE ** (-torch.arange(half, device=x.device) / half)
    angle = position.unsqueeze(-1) * frequency
    first, second = x[..., :half], x[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
