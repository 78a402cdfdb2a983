"""Attention of one prompt's chunk in plain torch code, which the backend compiles to selection and sparse attention.

the whole prompt           causal
a chunk of it              key <= query + context, the context being the keys before the chunk
with a window              and key > query + context - window
with softcap, with sinks   written out, as the backend recognises it
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...settings.config import SparsePrefillConfig
from ...torch_internals import maybe_mark_dynamic
from ..compiled_attention import CompiledAttention, Refusal

compiled_attention = CompiledAttention()


@dataclasses.dataclass(frozen=True)
class Form:
    """How a layer attends.

    Attributes:
        scale: Factor on the scores.
        window: How many keys a query sees, its own among them; None is all before it.
        softcap: Scores become ``softcap * tanh(score / softcap)``; None leaves them.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


def attend_to_prompt(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    form: Form,
    config: SparsePrefillConfig,
    inductor: Mapping[str, Any],
) -> Tensor | Refusal:
    """Attend sparsely, or tell why the attention must stay dense.

    Args:
        query: (1, H, Sq, D), the last of the prompt's tokens so far.
        key: (1, Hkv, Skv, D), Skv is at least Sq.
        value: (1, Hkv, Skv, D).
        sinks: (H,), one more logit for each head's softmax; None for none.
        form: How the layer attends.
        config: What to select.
        inductor: Options of inductor.

    Returns:
        (1, H, Sq, D).
    """
    is_whole, key_length = query.shape[2] == key.shape[2], key.shape[2]
    for x in (query, key, value):
        maybe_mark_dynamic(x, 2)  # lengths differ from step to step: one compilation serves all
    if form.window is not None and form.window >= key_length:
        form = dataclasses.replace(form, window=None)
    kind = (form, is_whole, sinks is None)
    if form.softcap is not None or sinks is not None:
        return compiled_attention(_attend_as_written, (query, key, value, sinks, form), kind, config, inductor)
    attend = _attend_causally if is_whole and form.window is None else _attend_under_mask
    return compiled_attention(attend, (query, key, value, form), kind, config, inductor)


def _attend_causally(query: Tensor, key: Tensor, value: Tensor, form: Form) -> Tensor:
    is_grouped = query.shape[1] != key.shape[1]
    return nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=form.scale, enable_gqa=is_grouped
    )


def _attend_under_mask(query: Tensor, key: Tensor, value: Tensor, form: Form) -> Tensor:
    is_grouped = query.shape[1] != key.shape[1]
    visible = _find_visible(query, key, form.window)
    return nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, scale=form.scale, enable_gqa=is_grouped
    )


def _attend_as_written(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, form: Form) -> Tensor:
    """Attend with softcap and sinks, which SDPA doesn't have."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * form.scale
    if form.softcap is not None:
        scores = torch.tanh(scores / form.softcap) * form.softcap
    scores = scores.masked_fill(~_find_visible(query, key, form.window), -torch.inf)
    if sinks is None:
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value
    logits = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(1, -1, query.shape[2], -1)
    weights = torch.softmax(torch.cat([scores, logits], dim=-1), dim=-1, dtype=torch.float32)
    return weights[..., :-1].to(query.dtype) @ value


def _find_visible(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Return which keys each query sees, (Sq, Skv) bool: never made, for the backend reads its formula."""
    query_position = torch.arange(query.shape[2], device=query.device).unsqueeze(-1) + key.shape[2] - query.shape[2]
    key_position = torch.arange(key.shape[2], device=query.device)
    visible = key_position <= query_position
    return visible if window is None else visible & (key_position > query_position - window)
