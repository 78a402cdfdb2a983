"""The custom ops that appear in a rewritten graph: their schemas and fakes. Torch only, registered at import.

The kernels are registered by ``block_masks/prefill.py`` and, for the CPU's ``realize``, here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import SymInt, Tensor

NAMESPACE = "flexprefill"
SELECT_BLOCKS = f"{NAMESPACE}::select_blocks"
REALIZE = f"{NAMESPACE}::realize"

_library = torch.library.Library(NAMESPACE, "DEF")

_library.define(
    "select_blocks(Tensor query, Tensor key, Tensor? value, float scale, float gamma, float tau, int min_budget, "
    "int? max_budget, int block_size, str estimator) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define("realize(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def index_width(num_blocks: int | SymInt, block_size: int, max_budget: int | None, device_type: str) -> Any:
    """Return how many columns the tables' indices have: as many as a row can need.

    Under a ceiling those are the ceiling and the first key block. FlexAttention's template for the CPU reads tables
    as wide as the grid. Both tables have one width, because torch 2.11 reads both with the strides of the first.
    """
    if max_budget is None or device_type == "cpu":
        return num_blocks
    return torch.sym_min(num_blocks, max_budget // block_size + 1)


def _fake_select_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    scale: float,
    gamma: float,
    tau: float,
    min_budget: int,
    max_budget: int | None,
    block_size: int,
    estimator: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    num_blocks = (length + block_size - 1) // block_size
    counts = (batch, heads, num_blocks)
    indices = (*counts, index_width(num_blocks, block_size, max_budget, query.device.type))
    return (
        query.new_empty(counts, dtype=torch.int32),
        query.new_empty(indices, dtype=torch.int32),
        query.new_empty(counts, dtype=torch.int32),
        query.new_empty(indices, dtype=torch.int32),
    )


def _fake_realize(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _realize(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


torch.library.register_fake(SELECT_BLOCKS, _fake_select_blocks, lib=_library)
torch.library.register_fake(REALIZE, _fake_realize, lib=_library)
torch.library.impl(REALIZE, "CPU", _realize, lib=_library)
