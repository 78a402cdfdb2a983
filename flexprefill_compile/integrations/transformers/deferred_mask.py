"""A mask that is a recipe until someone reads its elements.

Models hand a mask from where it is made to each attention layer. Sparse attention needs its formula only, so no tensor
of S x S elements is made; what reads the mask as a tensor gets that tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ...torch_internals import disabled_torch_function


@dataclasses.dataclass(frozen=True, eq=False)
class MaskRecipe:
    """What a mask is made of.

    Attributes:
        mask_function: Takes index tensors of batch, head, query and key that broadcast, returns bool. Positions count
            from the first token of the prompt.
        q_offset: The position of the first query: an int or a tensor of no dimensions.
        kv_offset: The position of the first key.
        padding: (B, tokens) bool, False for padding; None is no padding.
        use_vmap: Whether the function takes scalars only.
    """

    mask_function: Callable[..., Tensor]
    q_offset: int | Tensor
    kv_offset: int
    padding: Tensor | None
    use_vmap: bool


class DeferredMask(Tensor):
    """A (B, 1, Sq, Skv) bool mask, True where a query sees a key, made when it is first read.

    Attributes:
        recipe: What it is made of.
    """

    recipe: MaskRecipe
    _make: Callable[[], Tensor]
    _made: Tensor | None

    @staticmethod
    def __new__(
        cls: type[DeferredMask],
        recipe: MaskRecipe,
        shape: tuple[int, int, int, int],
        device: torch.device,
        make: Callable[[], Tensor],
    ) -> DeferredMask:
        """Take a recipe and what makes the mask of it."""
        mask: DeferredMask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask.recipe, mask._make, mask._made = recipe, make, None
        return mask

    def materialise(self) -> Tensor:
        """Return the mask as a plain tensor, the same one each time."""
        if self._made is None:
            self._made = self._make()
        return self._made

    def __repr__(self) -> str:  # type: ignore[override]  # print() gives no more
        """Return the shape; the elements may be many."""
        return f"DeferredMask{tuple(self.shape)}"

    __torch_function__ = disabled_torch_function  # type: ignore[assignment]  # as torch documents it

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # as torch documents it
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run any operation on the mask as a plain tensor."""
        args, kwargs = tree_map_only(DeferredMask, DeferredMask.materialise, (args, dict(kwargs or {})))
        return func(*args, **kwargs)
