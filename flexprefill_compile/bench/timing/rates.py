"""How fast a device copies and multiplies, and the least time of each stage that follows from it."""

from __future__ import annotations

import torch
from torch import Tensor

from flexprefill_compile.block_masks.kernels.pooled import POOL_TOKENS, QUERY_STRIDE
from flexprefill_compile.block_masks.layout import count_blocks, count_causal_blocks

from .clocks import time_ms

ATTENTION = "flex_attention"
# Elements of the copy and rows of the product: beyond the caches, and still some milliseconds.
_COPIED_ELEMENTS = {"cpu": 2**24, "cuda": 2**29}
_PRODUCT_ROWS = {"cpu": 1024, "cuda": 8192}


def measure_rates(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Measure bytes a second of a large copy, read and written, and FLOP a second of a large product."""
    source = torch.randn(_COPIED_ELEMENTS[device], device=device)
    target = torch.empty_like(source)
    copy_ms = time_ms(lambda: target.copy_(source), device, 10)
    rows = _PRODUCT_ROWS[device]
    a, b = (torch.randn(rows, rows, device=device, dtype=dtype) for _ in range(2))
    product_ms = time_ms(lambda: a @ b, device, 10)
    return {"copy": 2 * source.nbytes / copy_ms * 1e3, "product": 2 * rows**3 / product_ms * 1e3}


def compute_floors(
    query: Tensor, key: Tensor, value: Tensor, block_size: int, density: float, rates: dict[str, float]
) -> dict[str, float]:
    """Return the least milliseconds of the main stages: bytes and operations over the measured rates.

    Args:
        query: (1, H, S, D).
        key: (1, Hkv, S, D).
        value: (1, Hkv, S, Dv).
        block_size: Tokens a block.
        density: Share of the causal blocks that attention computes.
        rates: Of ``measure_rates``.
    """
    heads, length, head_dim = query.shape[1:]
    blocks = density * heads * count_causal_blocks(count_blocks(length, block_size))
    pooled_scores = heads * (length / QUERY_STRIDE) * (length / POOL_TOKENS) / 2
    return {
        "pool_keys": (key.nbytes + value.nbytes) / rates["copy"] * 1e3,
        "select_by_pools": 2 * head_dim * pooled_scores / rates["product"] * 1e3,
        "pool_inputs": (query.nbytes + key.nbytes + value.nbytes) / rates["copy"] * 1e3,
        "score_representative": 2 * heads * min(block_size, length) * length * head_dim / rates["product"] * 1e3,
        ATTENTION: 2 * (head_dim + value.shape[-1]) * block_size**2 * blocks / rates["product"] * 1e3,
    }
