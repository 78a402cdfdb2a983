"""What is computed of one mask at run time: facts of its blocks, its bias for some rows, and the check of its formula.

None of it has S x S elements, but for the check.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from flexprefill_compile.block_masks.layout import AttentionSizes, count_blocks, unpack_blocks
from flexprefill_compile.block_masks.masks.facts import MaskFacts, describe_mask, representative_indices
from flexprefill_compile.block_masks.masks.intervals import BlockBounds, classify_blocks
from flexprefill_compile.torch_internals import statically_known_true

from ..graph.nodes import example_of
from ..graph.trace import inline
from ..lift.elements import ElementFunction
from ..lift.lifted_site import LiftedSite
from .captured_values import CapturedValues


def insert_facts(
    graph: Graph,
    lifted: LiftedSite,
    mask: ElementFunction,
    captures: tuple[Any, ...],
    sizes: AttentionSizes,
    tables: Any,
    block_size: int,
) -> MaskFacts:
    """Insert what block selection has to know of a mask.

    Args:
        graph: It is inserting.
        lifted: An attention under the mask.
        mask: Its mask_mod.
        captures: What the mask_mod takes after its indices, nodes or constants.
        sizes: Of the attention, nodes or constants.
        tables: The block-mask tuple of a FlexAttention call, which narrows the blocks; None for other forms.
        block_size: Of the selection, in tokens.

    Returns:
        The nodes of the facts.
    """
    device = example_of(lifted.site.query).device
    num_captures = len(captures)

    def compute(*values: Any) -> tuple[Tensor, ...]:
        captured, measured = values[:num_captures], AttentionSizes(*values[num_captures : num_captures + 4])
        if tables is None:
            bounds = classify_blocks(mask.module, captured, measured, block_size, device)
            # A ragged last block is left to the mask_mod, whose kernel minds where the keys end.
            is_whole = torch.arange(bounds.certain.shape[-1], device=device) < measured.key_length // block_size
            bounds = BlockBounds(bounds.certain & is_whole, bounds.possible)
        else:
            bounds = _read_tables(values[-4:], count_blocks(measured.key_length, block_size))
        is_square = statically_known_true(measured.query_length == measured.key_length)
        offset = lifted.bounds.compute_offset(mask, captured, measured.key_length - measured.query_length)
        found = lifted.bounds
        if found.is_given and found.offset is None and not is_square:
            offset = _find_offset(mask, captured, measured, block_size, device)
        if isinstance(offset, Tensor):  # data, which may say anything
            offset = offset.clamp(min=0).clamp(max=measured.key_length - measured.query_length)
        return tuple(
            describe_mask(
                *(mask.module, captured, measured, bounds, offset),
                is_packed=found.is_packed and is_square,  # in a chunk of packed prompts sequences are not told apart
                block_size=block_size,
                is_causal=found.is_causal and tables is None,  # blocks listed as full are not under the mask_mod
            )
        )

    nodes: list[Any] = list(inline(graph, compute, (*captures, *sizes, *(tables[2:6] if tables else ()))))
    return MaskFacts(*nodes)


def insert_bias(
    graph: Graph, bias: ElementFunction, captures: tuple[Any, ...], rows: Any, sizes: AttentionSizes
) -> Node:
    """Insert what the model adds to the scores of the representative queries, whose rows are given.

    Returns:
        The node of (B|1, H|1, num_k_blocks, block_size, block_size), for the representative queries and all keys.
    """
    uses = _IndexUse(bias)

    def compute(rows: Tensor, batch: int, heads: int, key_length: int, *values: Any) -> tuple[Tensor]:
        indices = representative_indices(rows, batch if uses.batch else 1, heads if uses.heads else 1, key_length)
        shape = torch.broadcast_shapes(*(index.shape for index in indices))
        return (bias.module(*indices, *values).expand(shape),)

    (node,) = inline(graph, compute, (rows, sizes.batch, sizes.heads, sizes.key_length, *captures))
    return node


def insert_mask_check(
    graph: Graph, captured: CapturedValues, lifted: LiftedSite, query: Node, key: Node, materialised: Node
) -> Node:
    """Insert the comparison of a mask with its formula; return the node to use in place of ``query``."""
    mask, bias = lifted.parts.mask, lifted.parts.bias
    assert mask is not None
    sizes = captured.measure(query, key)
    captures = [captured.read(function, lifted) for function in (mask, bias) if function is not None]
    device = example_of(query).device

    def check(query: Tensor, materialised: Tensor, *values: Any) -> tuple[Tensor]:
        shape, values = values[:4], values[4:]
        indices = [torch.arange(n, device=device).view(-1, *[1] * (3 - dim)) for dim, n in enumerate(shape)]
        visible = mask.module(*indices, *values[: len(captures[0])])
        added = None if bias is None else bias.module(*indices, *values[len(captures[0]) :])
        return (torch.ops.flexprefill.check_mask(query, materialised, visible, added),)

    nodes = inline(graph, check, (query, materialised, *sizes, *(c for group in captures for c in group)))
    return nodes[0]


def _find_offset(
    mask: ElementFunction, captures: Sequence[Any], sizes: AttentionSizes, num_asked: int, device: torch.device
) -> Tensor:
    """Return the position of the first query among the keys under a mask that doesn't say it: () int64.

    The last key that a query sees is taken for its own, unless it is padding: then an earlier one is the last, or
    none. So some queries are asked, evenly spread, the first and the last among them, and the furthest key counts.
    """
    batch, heads, query_length, key_length = sizes
    key_index = torch.arange(key_length, device=device)
    rows = (torch.arange(num_asked, device=device) * (query_length - 1) // (num_asked - 1)).unsqueeze(-1)
    batch_index = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    head_index = torch.arange(heads, device=device).view(-1, 1, 1)
    visible = mask.module(batch_index, head_index, rows, key_index, *captures)
    last_key = torch.where(visible.expand(batch, heads, num_asked, key_length), key_index, -1).amax((0, 1, 3))
    offset: Tensor = torch.where(last_key >= 0, last_key - rows.squeeze(-1), -1).amax()
    return torch.where(offset >= 0, offset, key_length - query_length)


def _read_tables(tables: Sequence[Any], num_k_blocks: int) -> BlockBounds:
    """Read the blocks that a FlexAttention call lists: those under its mask_mod, then the full ones, if any."""
    partial = unpack_blocks(tables[0], tables[1], num_k_blocks)
    if tables[2] is None:
        return BlockBounds(certain=torch.zeros_like(partial), possible=partial)
    full = unpack_blocks(tables[2], tables[3], num_k_blocks)
    return BlockBounds(certain=full, possible=partial | full)


class _IndexUse:
    """Which indices a function reads."""

    def __init__(self, function: ElementFunction) -> None:
        placeholders = {node.name: node for node in function.module.graph.find_nodes(op="placeholder")}
        self.batch = bool(placeholders["batch"].users)
        self.heads = bool(placeholders["head"].users)
