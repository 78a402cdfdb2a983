"""What a model does without this implementation: SDPA, or its own written-out attention where SDPA can't do the same.

Sinks and softcaps are such cases: models that have them say that they don't support SDPA.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .deferred_mask import DeferredMask

# The model's own ``eager_attention_forward``; None is SDPA.
Form = Callable[..., Any] | None


_forms: dict[tuple[type[nn.Module], bool], Form] = {}


def find_form(module: nn.Module, given: dict[str, Any]) -> Form:
    """Return a model's written-out attention if SDPA can't do the same, as the model's class or its arguments say."""
    layer, has_extras = type(module), any(given.get(name) is not None for name in ("softcap", "s_aux"))
    if (layer, has_extras) not in _forms:
        modeling = sys.modules[layer.__module__]
        classes = [x for x in vars(modeling).values() if isinstance(x, type) and issubclass(x, PreTrainedModel)]
        supports_sdpa = any(model._supports_sdpa for model in classes)
        written: Form = getattr(modeling, "eager_attention_forward", None)
        _forms[layer, has_extras] = written if has_extras or not supports_sdpa else None
    return _forms[layer, has_extras]


def is_causal_without_mask(module: nn.Module, is_causal: bool | None) -> bool:
    """Tell whether attention without a mask is causal: as the call says, else as the layer says."""
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def attend_densely(
    form: Form,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    given: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Attend as the model does without this implementation."""
    mask = mask.materialise() if isinstance(mask, DeferredMask) else mask
    if form is None:
        output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, **given)
        return output
    is_causal = is_causal_without_mask(module, given["is_causal"])
    addend = as_addend(mask, query, key, is_causal=is_causal)
    written: tuple[Tensor, Tensor | None] = form(module, query, key, value, addend, **given)
    return written


def as_addend(mask: Tensor | None, query: Tensor, key: Tensor, *, is_causal: bool) -> Tensor | None:
    """Return a mask as written-out attention takes it, to be added to the scores."""
    if mask is None and is_causal and query.shape[2] > 1:
        tokens = [torch.arange(x.shape[2], device=x.device) for x in (query, key)]
        mask = (tokens[0].unsqueeze(-1) >= tokens[1]).view(1, 1, *(len(t) for t in tokens))
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask, torch.zeros((), dtype=query.dtype, device=mask.device), torch.finfo(query.dtype).min)
