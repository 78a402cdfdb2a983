"""The attention implementation "flexprefill" of transformers: sparse prefill for models that are not compiled.

    mask function       what a layer may see       ->  None for causal, or a DeferredMask: the formula, no S x S tensor
    attention function  query, key, value, mask    ->  one compiled graph for each kind of layer, or dense attention

Dense attention is what the model would do otherwise: transformers' SDPA, or the model's own written-out form where
SDPA can't express it (sinks, softcap). The sparse form is made of the same code by the backend.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from flexprefill_compile.passes.match.prefill_lengths import refuse_lengths
from flexprefill_compile.passes.match.site import describe_shapes

from ..report import AttentionSkippedError, RewriteReport, Rewritten, Site, Skipped, SkipReason
from .compiled_attention import CompiledAttention, Refusal, describe_formula
from .deferred_mask import DeferredMask, MaskRecipe
from .model_settings import LayerSettings, find_layer_settings

NAME = "flexprefill"
_OUTCOME = "_flexprefill_outcome"

compiled_attention = CompiledAttention()


def register() -> None:
    """Register the attention function and its mask function."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, defer_mask)


def read_report(model: nn.Module) -> RewriteReport:
    """Return what became of each attention layer of a model in its latest prefill; ``str()`` is a table."""
    outcomes = [(name, getattr(module, _OUTCOME)) for name, module in model.named_modules() if hasattr(module, _OUTCOME)]
    sites: list[Site] = []
    for name, (shapes, refusal) in outcomes:
        sites.append(Rewritten(name, shapes) if refusal is None else Skipped(name, shapes, *refusal))
    return RewriteReport(tuple(sites))


# Masks


def defer_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """Return the mask of a forward pass, for all its layers of one kind: transformers' mask interface.

    Args:
        batch_size: B.
        q_length: Sq; of a decode step the mask is a plain tensor.
        kv_length: Skv.
        mask_function: What a query sees, by the positions of query and key.
        q_offset: The position of the first query.
        kv_offset: The position of the first key.
        attention_mask: (B, tokens) bool, False for padding.
        use_vmap: Whether the mask function takes scalars only.
        device: Of the mask.
        **kwargs: What else transformers' ``sdpa_mask`` takes.

    Returns:
        None where SDPA needs no mask: plain causal attention, or one query that sees all. Else (B, 1, Sq, Skv) bool.
    """
    # A static cache moves its position, in place, before the mask is read.
    q_offset = q_offset.clone() if isinstance(q_offset, Tensor) else q_offset
    arguments = {
        **kwargs,
        **{"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset},
        **{"kv_offset": kv_offset, "mask_function": mask_function, "attention_mask": attention_mask},
        **{"use_vmap": use_vmap, "device": device},
    }
    if q_length == 1 or torch.compiler.is_compiling():
        return sdpa_mask(**arguments)
    if sdpa_mask(**arguments | {"mask_function": _see_nothing, "use_vmap": False}) is None:
        return None
    always = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    recipe = MaskRecipe(mask_function, q_offset, kv_offset, attention_mask, use_vmap)
    make = functools.partial(sdpa_mask, **arguments | always)
    return DeferredMask(recipe, (batch_size, 1, q_length, kv_length), torch.device(device), make)


def _see_nothing(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Stand in for a mask function where it only counts whether there is to be a mask: one element."""
    return query.new_zeros((1, 1, 1, 1), dtype=torch.bool)


# Attention


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
    form = _find_written_form(type(module), has_extras=any(kwargs.get(name) is not None for name in ("softcap", "s_aux")))
    given = {"scaling": scaling, "dropout": dropout, "is_causal": is_causal, **kwargs}
    if torch.compiler.is_compiling() or query.shape[2] == 1:
        return _attend_densely(form, module, query, key, value, attention_mask, given)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal and key.shape[2] > query.shape[2]:  # an empty static cache
        key, value = (x[:, :, : query.shape[2]] for x in (key, value))

    settings = find_layer_settings(module, query)
    output = _try_sparse(form, module, (query, key, value), attention_mask, bool(causal), settings, given)
    refusal = None if isinstance(output, Tensor) else output
    setattr(module, _OUTCOME, (describe_shapes(query, key), refusal))
    if isinstance(output, Tensor):
        return output, None
    if settings.on_skip == "raise" and not output[0].is_by_design:
        raise AttentionSkippedError(Skipped(f"of layer {settings.layer}", describe_shapes(query, key), *output))
    return _attend_densely(form, module, query, key, value, attention_mask, given)


# The model's own ``eager_attention_forward``; None is SDPA.
_Form = Callable[..., Any] | None


@functools.cache
def _find_written_form(layer: type[nn.Module], *, has_extras: bool) -> _Form:
    """Return a model's written-out attention if SDPA can't do the same, as the model's class says, or its arguments."""
    modeling = sys.modules[layer.__module__]
    classes = [x for x in vars(modeling).values() if isinstance(x, type) and issubclass(x, PreTrainedModel)]
    supports_sdpa = any(model._supports_sdpa for model in classes)
    written: _Form = getattr(modeling, "eager_attention_forward", None)
    return written if has_extras or not supports_sdpa else None


def _attend_densely(
    form: _Form,
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
    written: tuple[Tensor, Tensor | None] = form(module, query, key, value, _add_up(mask, query, key), **given)
    return written


def _add_up(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Return a mask as written-out attention takes it, to be added to the scores."""
    if mask is None and query.shape[2] > 1:
        tokens = [torch.arange(x.shape[2], device=x.device) for x in (query, key)]
        mask = (tokens[0].unsqueeze(-1) >= tokens[1]).view(1, 1, *(len(t) for t in tokens))
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask, torch.zeros((), dtype=query.dtype, device=mask.device), torch.finfo(query.dtype).min)


def _try_sparse(
    form: _Form,
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
    scaling, formula = given["scaling"], _describe_mask(taken, query, key)
    if form is None:
        kind: tuple[object, ...] = (scaling, formula)
        return compiled_attention(_attend_by_sdpa, (*inputs, taken, scaling), kind, settings.config, settings.inductor)
    kind = (scaling, formula, form, type(module))
    given = {**given, "dropout": 0.0}
    return compiled_attention(
        _attend_as_written, (*inputs, taken, form, module, given), kind, settings.config, settings.inductor
    )


def _describe_mask(mask: MaskRecipe | Tensor | None, query: Tensor, key: Tensor) -> object:
    """Return what of a mask decides its formula: numbers that are 0 in one kind of call must not become symbols."""
    if not isinstance(mask, MaskRecipe):
        return describe_formula(mask)
    offsets = [not isinstance(offset, Tensor) and offset == 0 for offset in (mask.q_offset, mask.kv_offset)]
    formula = describe_formula(mask.mask_function)
    return formula, mask.padding is None, mask.use_vmap, *offsets, query.shape[2] == key.shape[2]


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
    if given["dropout"]:
        return SkipReason.DROPOUT, f"dropout_p={given['dropout']}"
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return SkipReason.GRADIENT, ""
    if given.get("cache") is not None or given.get("position_bias") is not None:
        return SkipReason.UNRECOGNISED, "a paged cache or a position bias"
    if mask is None and not is_causal:
        return SkipReason.NOT_CAUSAL, ""
    if settings.config is None:
        return SkipReason.DENSE_LAYER, ""
    lengths = refuse_lengths(query.shape[2], key.shape[2], settings.config, is_causal=mask is None)
    if lengths is not None:
        return lengths
    limit = settings.config.max_mask_elements
    if mask is not None and not isinstance(mask, DeferredMask) and mask.numel() > limit:
        return SkipReason.MASK_NOT_LIFTED, f"a mask of {mask.numel()} elements, more than {limit}"
    return None


# What the backend compiles


def _attend_by_sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: MaskRecipe | Tensor | None, scaling: float | None
) -> Tensor:
    visible = _make_mask(mask, query, key)
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
    bias = _add_up(_make_mask(mask, query, key), query, key)
    output: Tensor = form(module, query, key, value, bias, **given)[0]
    return output


def _make_mask(mask: MaskRecipe | Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Write a mask as transformers does, in operations that the backend turns back into a formula."""
    if not isinstance(mask, MaskRecipe):
        return mask
    visible: Tensor = sdpa_mask(
        batch_size=query.shape[0],
        q_length=query.shape[2],
        kv_length=query.shape[2] if query.shape[2] == key.shape[2] else key.shape[2],  # one symbol, where they are equal
        q_offset=mask.q_offset,
        kv_offset=mask.kv_offset,
        mask_function=mask.mask_function,
        attention_mask=mask.padding,
        allow_is_causal_skip=False,
        use_vmap=mask.use_vmap,
        device=query.device,
    )
    return visible
