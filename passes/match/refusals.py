"""What keeps any form of attention dense: its tensors, dtype, device or heads, dropout, or a gradient.

Each function returns a reason, or None. Matchers check these cheap facts first and lengths (prefill_lengths.py) last,
because a check of lengths may add guards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexprefill_compile.report import SkipReason
from flexprefill_compile.torch_internals import FakeTensor, guard_or_false, statically_known_true

from .site import describe_shape

# Why an attention stays dense, and the value that decided.
Refusal = tuple[SkipReason, str]

_SUPPORTED_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_SUPPORTED_DEVICES = frozenset({"cpu", "cuda"})
_SMALLEST_HEAD_DIM = 16


def refuse_tensors(*tensors: Any) -> Refusal | None:
    """Refuse what is no plain tensor on a supported device, and by dtype the last of them: the output."""
    for tensor in tensors:
        if type(tensor) is not FakeTensor:
            return SkipReason.TENSOR_SUBCLASS, type(tensor).__name__
        if tensor.device.type not in _SUPPORTED_DEVICES:
            return SkipReason.DEVICE, str(tensor.device)
    output = tensors[-1]
    if output.dtype not in _SUPPORTED_DTYPES:
        return SkipReason.DTYPE, str(output.dtype)
    return None


def refuse_decode(query: Tensor) -> Refusal | None:
    """Refuse a single query."""
    if query.dim() > 2 and statically_known_true(query.shape[-2] == 1):
        return SkipReason.DECODE, ""
    return None


def refuse_dropout(probability: Any) -> Refusal | None:
    """Refuse dropout of a probability that is not, or may not be, 0."""
    if not guard_or_false(probability == 0):
        return SkipReason.DROPOUT, f"dropout_p={probability}"
    return None


def refuse_gradient(output: Tensor) -> Refusal | None:
    """Refuse an attention that autograd records."""
    return (SkipReason.GRADIENT, "") if output.requires_grad else None


def refuse_heads(query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool) -> Refusal | None:
    """Refuse what is not (B, H, S, D) of one batch size, and head counts that don't match.

    Args:
        query: The example of (B, H, Sq, D).
        key: The example of (B, Hkv, Skv, D).
        value: The example of (B, Hkv, Skv, Dv).
        enable_gqa: Whether each key head serves a group of query heads; without it they match or broadcast.
    """
    shapes = ", ".join(describe_shape(tensor) for tensor in (query, key, value))
    if not query.dim() == key.dim() == value.dim() == 4:
        return SkipReason.SHAPE, shapes
    if not guard_or_false(query.shape[0] == key.shape[0]) or not guard_or_false(key.shape[0] == value.shape[0]):
        return SkipReason.SHAPE, f"batches broadcast: {shapes}"
    # int() pins symbolic counts: they are constants of a model, and inductor takes FlexAttention's as such only.
    num_heads, num_kv_heads, num_value_heads = (int(tensor.shape[1]) for tensor in (query, key, value))
    shares_heads = num_kv_heads in {num_heads, 1} or (enable_gqa and num_heads % num_kv_heads == 0)
    if num_kv_heads != num_value_heads or not shares_heads:
        return SkipReason.SHAPE, shapes
    smallest = min(int(query.shape[-1]), int(value.shape[-1]))
    if smallest < _SMALLEST_HEAD_DIM:
        return SkipReason.HEAD_DIM, f"{smallest} < {_SMALLEST_HEAD_DIM}"
    return None
