"""The custom ops that appear in a rewritten graph: their schemas and fakes. Torch only, registered at import.

The kernels are registered by ``block_masks/prefill.py``, ``block_masks/masked_prefill.py``,
``block_masks/density_ceiling.py`` and ``block_masks/observed_attention.py``; those of ``realize`` and ``check_mask``
here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import SymInt, Tensor

from .settings.config import SELECTION
from .torch_internals import attention_strides

_NAMESPACE = "flexprefill"
SELECT_BLOCKS = f"{_NAMESPACE}::select_blocks"
SELECT_MASKED_BLOCKS = f"{_NAMESPACE}::select_masked_blocks"
IS_SPARSE = f"{_NAMESPACE}::is_sparse"
ATTEND_DENSELY = f"{_NAMESPACE}::attend_densely"
_REALIZE = f"{_NAMESPACE}::realize"
_CHECK_MASK = f"{_NAMESPACE}::check_mask"
OBSERVE = f"{_NAMESPACE}::observe"

_library = torch.library.Library(_NAMESPACE, "DEF")

_SELECTION_ARGUMENTS = ", ".join(f"{type_} {name}" for name, type_ in SELECTION.items())
_TABLES = "(Tensor, Tensor, Tensor, Tensor)"

_library.define(
    f"select_blocks(Tensor query, Tensor key, Tensor? value, float scale, {_SELECTION_ARGUMENTS}) -> {_TABLES}",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    # Returns a bool on the CPU: the host decides, without a second read.
    "is_sparse(Tensor kv_num_blocks, Tensor full_kv_num_blocks, SymInt length, float max_density, int from_length) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "attend_densely(Tensor query, Tensor key, Tensor value, float scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define("realize(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
# Returns a copy of ``query``, so that nothing drops the check.
_library.define(
    "check_mask(Tensor query, Tensor mask, Tensor visible, Tensor? bias) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# Returns a copy of ``output``, so that nothing drops the observation. ``tables`` are the fields of a BlockTables,
# ``facts`` those of a MaskFacts, or none.
_library.define(
    "observe(Tensor output, Tensor query, Tensor key, Tensor value, Tensor[] tables, Tensor[] facts, "
    "Tensor? score_bias, Tensor rows, Tensor? visible, Tensor? row_bias, float scale, float? softcap, str name) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def define_select_masked_blocks(facts: Iterable[str]) -> None:
    """Define the op ``select_masked_blocks``, which takes what is known of a mask as one tensor each.

    Args:
        facts: Their names, the first of them ``certain``, (B|1, H|1, num_q_blocks, num_k_blocks).
    """
    _library.define(
        f"select_masked_blocks(Tensor query, Tensor key, Tensor? value, {', '.join(f'Tensor {f}' for f in facts)}, "
        f"Tensor? score_bias, float scale, float? softcap, {_SELECTION_ARGUMENTS}) -> {_TABLES}",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    torch.library.register_fake(SELECT_MASKED_BLOCKS, _fake_select_masked_blocks, lib=_library)


def index_width(num_blocks: int | SymInt, block_size: int, max_budget: int | None, device_type: str) -> Any:
    """Return how many columns the tables' indices have: as many as a row can need.

    Under a ceiling those are the ceiling and the first key block. FlexAttention's template for the CPU reads tables
    as wide as the grid. Both tables have one width, because torch 2.11 reads both with the strides of the first.
    """
    if max_budget is None or device_type == "cpu":
        return num_blocks
    return torch.sym_min(num_blocks, max_budget // block_size + 1)


def _fake_select_blocks(
    query: Tensor, key: Tensor, value: Tensor | None, scale: float, *selection: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    settings = dict(zip(SELECTION, selection, strict=True))
    block_size = settings["block_size"]
    num_blocks = (query.shape[2] + block_size - 1) // block_size
    width = index_width(num_blocks, block_size, settings["max_budget"], query.device.type)
    return _empty_tables(query, num_blocks, width)


def _fake_select_masked_blocks(
    query: Tensor, key: Tensor, value: Tensor | None, certain: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_tables(query, *certain.shape[-2:])


def _empty_tables(query: Tensor, num_q_blocks: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counts = (*query.shape[:2], num_q_blocks)
    indices = (*counts, width)
    return (
        query.new_empty(counts, dtype=torch.int32),
        query.new_empty(indices, dtype=torch.int32),
        query.new_empty(counts, dtype=torch.int32),
        query.new_empty(indices, dtype=torch.int32),
    )


def _fake_is_sparse(
    kv_num_blocks: Tensor, full_kv_num_blocks: Tensor, length: int, max_density: float, from_length: int
) -> Tensor:
    return torch.empty((), dtype=torch.bool, device="cpu")


def _fake_attend_densely(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    return output.new_empty_strided(output.shape, attention_strides(output, query))


def _fake_realize(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _realize(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _fake_observe(output: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(output)


def _fake_check_mask(query: Tensor, mask: Tensor, visible: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty_like(query)


def _check_mask(query: Tensor, mask: Tensor, visible: Tensor, bias: Tensor | None) -> Tensor:
    """Compare a mask with its formula, for debugging: this waits for the device.

    Args:
        query: Passed through.
        mask: (B|1, H|1, Sq, Skv), bool or added to the scores.
        visible: What broadcasts to it, bool: where the formula lets a query see a key.
        bias: What the formula adds there, or None.

    Raises:
        RuntimeError: They differ.
    """
    expected = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    if not torch.equal(visible.expand_as(expected | visible), expected.expand_as(expected | visible)):
        raise RuntimeError("the formula of a mask hides other keys than the mask; please report this")
    if mask.dtype != torch.bool:
        added = torch.zeros((), dtype=mask.dtype, device=mask.device) if bias is None else bias.to(mask.dtype)
        difference = torch.where(expected, mask - added, 0)
        if difference.abs().max() > 1e-5 * torch.where(expected, mask, 0).abs().max():
            raise RuntimeError(
                "the formula of a mask adds something else to the scores than the mask; please report this"
            )
    return query.clone()


torch.library.register_fake(_CHECK_MASK, _fake_check_mask, lib=_library)
torch.library.impl(_CHECK_MASK, "CompositeExplicitAutograd", _check_mask, lib=_library)
torch.library.register_fake(OBSERVE, _fake_observe, lib=_library)
torch.library.register_fake(IS_SPARSE, _fake_is_sparse, lib=_library)
torch.library.register_fake(ATTEND_DENSELY, _fake_attend_densely, lib=_library)
torch.library.register_fake(SELECT_BLOCKS, _fake_select_blocks, lib=_library)
torch.library.register_fake(_REALIZE, _fake_realize, lib=_library)
torch.library.impl(_REALIZE, "CompositeExplicitAutograd", _realize, lib=_library)
