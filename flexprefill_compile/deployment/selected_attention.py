"""The operator ``flexprefill_attention``: FlexAttention over selected blocks, as exported programs hold it.

    flex_attention(q, k, v, score_mod, (Sq, Skv, *tables, ..., mask_mod), scale, options, captures, captures)

becomes

    flexprefill_attention(q, k, v, score_mod, mask_mod, tables, block_size, scale, options, 1, *captures)

FlexAttention's own operator can't be saved: torch.export has no form for its tuple of tensors, numbers and a function.
Nor does it run right where it isn't compiled: there it ignores the tables and attends to all that the mask allows.
Inductor lowers this operator as it lowers FlexAttention's. Uncompiled, it takes the time of dense attention and attends
to the selected blocks alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.fx import Node

from flexprefill_compile.block_masks.layout import BlockTables, unpack_blocks
from flexprefill_compile.block_masks.prefill import create_block_mask
from flexprefill_compile.passes.rewrite.cpu_workarounds import TEMPLATE_REPAIRS

from ..torch_internals import attention_strides, cpp_flex_attention_template, flex_attention_hop
from ..torch_internals.operators import (
    DispatchKey,
    HigherOrderOperator,
    ProxyTorchDispatchMode,
    ignore_functions_of,
    lowerings,
    register_fake,
    register_lowering,
    retrace,
    trace_call,
)

Outputs = tuple[Tensor, Tensor]
_NUM_TABLES = len(BlockTables._fields)


class SelectedAttention(HigherOrderOperator):
    """Exact attention over selected blocks, for inference."""

    def __init__(self) -> None:
        super().__init__("flexprefill_attention", cacheable=True)  # type: ignore[no-untyped-call]

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score_mod: Callable[..., Tensor],
        mask_mod: Callable[..., Tensor],
        tables: Sequence[Tensor],
        block_size: int,
        scale: float,
        kernel_options: dict[str, Any],
        num_score_captures: int,
        *captures: Any,
    ) -> Outputs:
        """Attend.

        Args:
            query: (B, H, Sq, D).
            key: (B, Hkv, Skv, D).
            value: (B, Hkv, Skv, Dv).
            score_mod: Takes score, batch, head, query index, key index, then its captures.
            mask_mod: Takes batch, head, query index, key index, then its captures.
            tables: The fields of a BlockTables.
            block_size: In tokens.
            scale: Factor on the scores.
            kernel_options: FlexAttention's.
            num_score_captures: How many of the captures are the score_mod's.
            *captures: Tensors and sizes: those of the score_mod, then those of the mask_mod.

        Returns:
            (B, H, Sq, Dv), and the log-sum-exp of each row's scores to the base 2, (B, H, Sq) float32.
        """
        arguments = (query, key, value, score_mod, mask_mod, tables, block_size, scale, kernel_options)
        return super().__call__(*arguments, num_score_captures, *captures)  # type: ignore[no-any-return, no-untyped-call]


selected_attention = SelectedAttention()
ignore_functions_of(selected_attention)


def from_flex_attention(call: Node) -> None:
    """Replace a node of FlexAttention's operator by one of this operator, in place."""
    arguments: tuple[Any, ...] = call.args
    query, key, value, score_mod, block_mask, scale, options, score_captures, mask_captures = arguments
    _, _, *entries, block_size, mask_mod = block_mask
    captures = (*score_captures, *mask_captures)
    call.args = (
        *(query, key, value, score_mod, mask_mod, entries[:_NUM_TABLES], block_size, scale, options),
        *(len(score_captures), *captures),
    )
    call.target = selected_attention


@register_fake(selected_attention)
def _fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Outputs:
    output = query.new_empty(*query.shape[:-1], value.shape[-1])
    output = output.new_empty_strided(output.shape, attention_strides(output, query))
    return output, query.new_empty(query.shape[:-1], dtype=torch.float32)


@selected_attention.py_impl(ProxyTorchDispatchMode)
def _trace(mode: ProxyTorchDispatchMode, *arguments: Any) -> Outputs:
    query, key, value, score_mod, mask_mod, *rest = arguments
    num_score_captures, *captures = rest[4:]
    indices = [query.new_zeros((), dtype=torch.int) for _ in range(4)]
    score_mod = retrace(score_mod, (query.new_zeros(()), *indices, *captures[:num_score_captures]))
    mask_mod = retrace(mask_mod, (*indices, *captures[num_score_captures:]))
    traced = (query, key, value, score_mod, mask_mod, *rest)
    return trace_call(mode, selected_attention, traced, ("score_mod", "mask_mod"))  # type: ignore[no-any-return]


@selected_attention.py_functionalize_impl
def _functionalize(context: Any, *arguments: Any) -> Outputs:
    unwrapped = context.unwrap_tensors(arguments)
    with context.redispatch_to_next():
        functions = [context.functionalize(function) for function in unwrapped[3:5]]
        return context.wrap_tensors(selected_attention(*unwrapped[:3], *functions, *unwrapped[5:]))  # type: ignore


@selected_attention.py_autograd_impl
def _refuse_autograd(*_: Any) -> Outputs:
    """Refuse to record a gradient.

    Raises:
        RuntimeError: Always.
    """
    raise RuntimeError("an exported sparse prefill is for inference: call it under torch.no_grad()")


@selected_attention.py_impl(DispatchKey.CompositeExplicitAutograd)
def attend_to_selected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor],
    mask_mod: Callable[..., Tensor],
    tables: Sequence[Tensor],
    block_size: int,
    scale: float,
    _: dict[str, Any],
    num_score_captures: int,
    *captures: Any,
) -> Outputs:
    """Do what the operator does in plain PyTorch, one block of queries at a time; in memory of one such block's scores.

    The arguments are those of the operator.
    """
    batch, heads, length, _head_dim = query.shape
    group = heads // key.shape[1]
    key, value = (x.float().repeat_interleave(group, dim=1) for x in (key, value))
    num_k_blocks = -(-key.shape[2] // block_size)
    masked, full = (unpack_blocks(counts, indices, num_k_blocks) for counts, indices in (tables[:2], tables[2:]))
    positions = [torch.arange(size, device=query.device) for size in (batch, heads, length, key.shape[2])]
    outputs, sums = [], []
    for start in range(0, length, block_size):
        rows = slice(start, start + block_size)
        indices = [
            x.view(-1, *[1] * (3 - dim)) for dim, x in enumerate((*positions[:2], positions[2][rows], positions[3]))
        ]
        scores = query[:, :, rows].float() @ key.mT * scale
        scores = score_mod(scores, *indices, *captures[:num_score_captures]).float()
        allowed = mask_mod(*indices, *captures[num_score_captures:])
        is_masked, is_full = (
            grid[:, :, start // block_size, None].repeat_interleave(block_size, -1)[..., : key.shape[2]]
            for grid in (masked, full)
        )
        visible = (is_masked & allowed) | is_full
        scores = scores.masked_fill(~visible, -torch.inf)
        weights = torch.where(visible.any(-1, keepdim=True), scores.softmax(-1), 0)
        outputs.append(weights @ value)
        sums.append(scores.logsumexp(-1) / math.log(2))
    output = torch.cat(outputs, dim=2).to(query.dtype)
    laid_out = output.new_empty_strided(output.shape, attention_strides(output, query))
    return laid_out.copy_(output), torch.cat(sums, dim=2)


@register_lowering(selected_attention, type_promotion_kind=None)
def _lower(
    query: Any,
    key: Any,
    value: Any,
    score_mod: Any,
    mask_mod: Any,
    tables: Sequence[Any],
    block_size: int,
    scale: float,
    kernel_options: dict[str, Any],
    num_score_captures: int,
    *captures: Any,
) -> Any:
    """Lower as FlexAttention's operator, with a template for the CPU that has no bugs."""
    block_mask = _create_block_mask(tables, (query.get_size()[2], key.get_size()[2]), block_size, mask_mod)
    module = cpp_flex_attention_template()
    with mock.patch.object(module, "CppFlexAttentionTemplate", _repaired_template()):
        return lowerings[flex_attention_hop](
            *(query, key, value, score_mod, block_mask, scale, dict(kernel_options)),
            *(list(captures[:num_score_captures]), list(captures[num_score_captures:])),
        )


@functools.cache
def _repaired_template() -> type:
    """Return inductor's template of FlexAttention for the CPU with the repairs of ``cpu_workarounds``."""
    template = cpp_flex_attention_template().CppFlexAttentionTemplate
    return type(
        "RepairedTemplate", (template,), {n: repair(getattr(template, n)) for n, repair in TEMPLATE_REPAIRS.items()}
    )


def _create_block_mask(
    tables: Sequence[Any], lengths: tuple[Any, Any], block_size: int, mask_mod: Any
) -> tuple[Any, ...]:
    """Return FlexAttention's tuple of a block mask. Its layout changes between releases, so a BlockMask tells it."""
    stand_ins = BlockTables(*(torch.zeros((1,) * dim, dtype=torch.int32) for dim in (3, 4, 3, 4)))
    _, _, *entries, _ = create_block_mask(stand_ins, block_size, block_size, block_size).as_tuple()
    places = {id(stand_in): table for stand_in, table in zip(stand_ins, tables, strict=True)}
    return (*lengths, *(places.get(id(entry), entry) for entry in entries), mask_mod)
