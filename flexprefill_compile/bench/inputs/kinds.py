"""The kinds of inputs by name: noise, structures with and without rotary positions, a real model's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .real import create_real_inputs
from .rotary import create_rotary_inputs
from .structured import create_structured_inputs

INPUT_KINDS = ("structured", "random", "rotary", "real")


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
