"""The attention function: sparse where a call is a proven prefill, else as the model attends without it.

The sparse form is the dense one, compiled by the backend: the same code says what both compute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flexprefill_compile.passes.match.prefill_lengths import refuse_lengths
from flexprefill_compile.passes.match.site import describe_shapes

from ...report import AttentionSkippedError, RewriteReport, Rewritten, Site, Skipped, SkipReason
from ..compiled_attention import CompiledAttention, Refusal
from .deferred_mask import DeferredMask, MaskRecipe
from .dense_attention import Form, as_addend, attend_densely, find_form, is_causal_without_mask
from .masks import describe_mask, make_mask
from .model_settings import LayerSettings, find_layer_settings

_OUTCOME = "_flexprefill_outcome"

compiled_attention = CompiledAttention()


def read_report(model: nn.Module) -> RewriteReport:
    """Return what became of each attention layer of a model in its latest prefill; ``str()`` is a table."""
    outcomes = [
        (name, getattr(module, _OUTCOME)) for name, module in model.named_modules() if hasattr(module, _OUTCOME)
    ]
    sites: list[Site] = []
    for name, (shapes, refusal) in outcomes:
        sites.append(Rewritten(name, shapes) if refusal is None else Skipped(name, shapes, *refusal))
    return RewriteReport(tuple(sites))


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend sparsely where that is a proven prefill, else as the model does without: transformers' interface.

    Args:
        module: The attention layer, with its ``config`` and, for settings by layer, its ``layer_idx``.
        query: (B, H, Sq, D).
        key: (B, Hkv, Skv, D).
        value: (B, Hkv, Skv, Dv).
        attention_mask: As ``defer_mask`` gives it, or (B, 1, Sq, Skv): bool, or added to the scores.
        scaling: Factor on the scores; None is 1 / sqrt(D).
        dropout: Probability.
        is_causal: Whether attention without a mask is causal; None is what the module says.
        **kwargs: What else the model hands to its attention.

    Returns:
        (B, Sq, H, Dv), and None: attention weights are made by written-out attention only.

    Raises:
        InvalidOptionError: ``config.flexprefill`` has an unknown option, or a value out of range.
        AttentionSkippedError: ``on_skip="raise"`` and the call must stay dense.
    """
    form = find_form(module, kwargs)
    given = {"scaling": scaling, "dropout": dropout, "is_causal": is_causal, **kwargs}
    if torch.compiler.is_compiling() or query.shape[2] == 1:
        return attend_densely(form, module, query, key, value, attention_mask, given)
    causal = is_causal_without_mask(module, is_causal)
    if attention_mask is None and causal and key.shape[2] > query.shape[2]:  # an empty static cache
        key, value = (x[:, :, : query.shape[2]] for x in (key, value))

    settings = find_layer_settings(module, query)
    output = _try_sparse(form, module, (query, key, value), attention_mask, causal, settings, given)
    refusal = None if isinstance(output, Tensor) else output
    setattr(module, _OUTCOME, (describe_shapes(query, key), refusal))
    if isinstance(output, Tensor):
        return output, None
    if settings.on_skip == "raise" and not output[0].is_by_design:
        raise AttentionSkippedError(Skipped(f"of layer {settings.layer}", describe_shapes(query, key), *output))
    return attend_densely(form, module, query, key, value, attention_mask, given)


def _try_sparse(
    form: Form,
    module: nn.Module,
    inputs: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    is_causal: bool,
    settings: LayerSettings,
    given: dict[str, Any],
) -> Tensor | Refusal:
    """Return the output, or why the call stays dense. Cheap facts come first; the backend sees to the others."""
    query, key, _ = inputs
    refusal = _refuse(inputs, mask, is_causal, settings, given)
    if refusal is not None:
        return refusal
    assert settings.config is not None
    taken: Any = mask
    if isinstance(mask, DeferredMask):
        fits = tuple(mask.shape) == (query.shape[0], 1, query.shape[2], key.shape[2])
        taken = mask.recipe if fits else mask.materialise()
    scaling, formula = given["scaling"], describe_mask(taken, query, key)
    if form is None:
        kind: tuple[object, ...] = (scaling, formula)
        return compiled_attention(_attend_by_sdpa, (*inputs, taken, scaling), kind, settings.config, settings.inductor)
    kind = (scaling, formula, form, type(module))
    given = {**given, "dropout": 0.0}
    return compiled_attention(
        _attend_as_written, (*inputs, taken, form, module, given), kind, settings.config, settings.inductor
    )


def _refuse(
    inputs: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    is_causal: bool,
    settings: LayerSettings,
    given: dict[str, Any],
) -> Refusal | None:
    query, key, _ = inputs
    if query.dim() != 4 or key.dim() != 4:
        return SkipReason.SHAPE, f"{tuple(query.shape)}, {tuple(key.shape)}"
    dropout, limit = given["dropout"], settings.max_mask_elements
    is_given = mask is not None and not isinstance(mask, DeferredMask)
    num_elements = mask.numel() if mask is not None else 0
    refusals: dict[Refusal, bool] = {
        (SkipReason.DROPOUT, f"dropout_p={dropout}"): dropout != 0,
        (SkipReason.GRADIENT, ""): torch.is_grad_enabled() and any(x.requires_grad for x in inputs),
        (SkipReason.UNRECOGNISED, "a paged cache"): given.get("cache") is not None,
        (SkipReason.UNRECOGNISED, "a position bias"): given.get("position_bias") is not None,
        (SkipReason.NOT_CAUSAL, ""): mask is None and not is_causal,
        (SkipReason.MASK_NOT_LIFTED, f"a mask of {num_elements} elements, more than {limit}"): (
            is_given and num_elements > limit
        ),
        (SkipReason.DENSE_LAYER, ""): settings.config is None,
    }
    refusal = next((refusal for refusal, holds in refusals.items() if holds), None)
    if refusal is not None or settings.config is None:
        return refusal
    return refuse_lengths(query.shape[2], key.shape[2], settings.config, is_causal=mask is None)


# What the backend compiles


def _attend_by_sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: MaskRecipe | Tensor | None, scaling: float | None
) -> Tensor:
    visible = make_mask(mask, query, key)
    output: Tensor = nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=visible,
        is_causal=visible is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).contiguous()


def _attend_as_written(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: MaskRecipe | Tensor | None,
    form: Callable[..., Any],
    module: nn.Module,
    given: dict[str, Any],
) -> Tensor:
    bias = as_addend(make_mask(mask, query, key), query, key, is_causal=True)
    output: Tensor = form(module, query, key, value, bias, **given)[0]
    return output
