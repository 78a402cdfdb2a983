"""Constants in a formula: their dtypes, and operations on them, computed while lifting.

A constant has no dimensions, so torch would promote it in another way than the tensor that it stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from .elements import Element

aten = torch.ops.aten


def promote(tensors: Sequence[Node]) -> torch.dtype:
    """Return the dtype that torch promotes traced tensors to, as it would the tensors themselves."""
    common: Tensor = tensors[0].meta["val"]
    dtype = common.dtype
    for node in tensors[1:]:
        dtype = torch.result_type(common, node.meta["val"])
        common = torch.empty((1,) * max(common.dim(), node.meta["val"].dim()), dtype=dtype, device="meta")
    return dtype


def dtype_of(value: Element) -> torch.dtype:
    """Return the dtype of a constant when it becomes a tensor."""
    return torch.bool if isinstance(value, bool) else torch.int64 if isinstance(value, int) else torch.float32


def compute(target: Any, arguments: Sequence[Any], keywords: dict[str, Any], dtype: torch.dtype) -> Element:
    """Run an operation on constants; return its result, rounded to ``dtype``."""
    tensors = [torch.tensor(a) if isinstance(a, bool | int | float) and i == 0 else a for i, a in enumerate(arguments)]
    if target is aten._to_copy.default:
        return cast("Element", tensors[0].to(dtype).item())
    try:
        result = target(*tensors, **keywords)
    except RuntimeError:
        result = target(*map(torch.tensor, arguments), **keywords)
    return cast("Element", result.to(dtype).item())
