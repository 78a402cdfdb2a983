"""The mask function: None for plain causal attention, else the recipe of the mask, and what is made of it.

sdpa_mask(mask_function, padding, offsets, ...)   ->   DeferredMask(MaskRecipe)      no S x S tensor
layers compiled by the backend                    ->   make_mask(recipe)             a formula, in the graph
layers that stay dense                            ->   mask.materialise()            one tensor, for all of them
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask

from ..compiled_attention import describe_formula
from .deferred_mask import DeferredMask, MaskRecipe


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

    def make() -> Tensor:
        return cast("Tensor", sdpa_mask(**arguments | always))

    return DeferredMask(recipe, (batch_size, 1, q_length, kv_length), torch.device(device), make)


def _see_nothing(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Stand in for a mask function where it only counts whether there is to be a mask: one element."""
    return query.new_zeros((1, 1, 1, 1), dtype=torch.bool)


def make_mask(mask: MaskRecipe | Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Write a mask as transformers does, in operations that the backend turns back into a formula."""
    if not isinstance(mask, MaskRecipe):
        return mask
    # Where the lengths are equal, one symbol stands for both.
    key_length = query.shape[2] if query.shape[2] == key.shape[2] else key.shape[2]
    return sdpa_mask(
        batch_size=query.shape[0],
        q_length=query.shape[2],
        kv_length=key_length,
        q_offset=cast("int", mask.q_offset),  # or a tensor, whatever its annotation says
        kv_offset=mask.kv_offset,
        mask_function=mask.mask_function,
        attention_mask=mask.padding,
        allow_is_causal_skip=False,
        use_vmap=mask.use_vmap,
        device=query.device,
    )


def describe_mask(mask: MaskRecipe | Tensor | None, query: Tensor, key: Tensor) -> object:
    """Return what of a mask decides its formula: numbers that are 0 in one kind of call must not become symbols."""
    if not isinstance(mask, MaskRecipe):
        return describe_formula(mask)
    offsets = [not isinstance(offset, Tensor) and offset == 0 for offset in (mask.q_offset, mask.kv_offset)]
    formula = describe_formula(mask.mask_function)
    return formula, mask.padding is None, mask.use_vmap, *offsets, query.shape[2] == key.shape[2]
