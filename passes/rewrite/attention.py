"""Rewrite an attention into block selection and FlexAttention over the selected blocks. Never refuses.

    out = scaled_dot_product_attention(q, k, v, is_causal=True)

becomes

    tables = flexprefill.select_blocks(q, k, v, scale, gamma, ...)
    out = flex_attention(q, k, v, identity_score, (S, S, *tables, ..., causal_mask), scale, kernel_options)[0]

and under a mask, whose facts are shared by its layers (mask_sharing.py),

    tables = flexprefill.select_masked_blocks(q, k, v, *facts, score_bias, scale, softcap, gamma, ...)
    out = flex_attention(q, k, v, score_mod, (Sq, Skv, *tables, ..., mask_mod), scale, ..., captures, captures)[0]

With a ceiling on density, the graph chooses sparse or dense attention at run time (density_branches.py). The mask_mod
runs on every block not proven full, so the result is exact attention over the selected blocks.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from flexprefill_compile.block_masks.layout import BlockTables
from flexprefill_compile.block_masks.prefill import causal_mask, create_block_mask
from flexprefill_compile.settings.config import DensityCeiling, SparsePrefillConfig
from flexprefill_compile.torch_internals import (
    attention_strides,
    complete_kernel_options,
    flex_attention_hop,
    statically_known_true,
)

from ..graph.nodes import example_of
from ..lift.lifted_site import LiftedSite
from ..match.site import AttentionSite, Masked
from .cpu_workarounds import realize_on_cpu
from .density_branches import insert_branches
from .insertion import Insert, Selection, insert_submodule, start_inserting
from .kernel_options import choose_kernel_options
from .mask_facts import insert_mask_check
from .mask_sharing import MaskSharing
from .observation import insert_observation
from .score_mod import insert_score, insert_temperature
from .sinks import add_sink_block, are_keys, insert_share_of_keys, insert_sinks

_MASK_MODULE = "flexprefill_causal_mask"  # fixed, because inductor's caches key on it


def rewrite_attention(
    lifted: LiftedSite,
    config: SparsePrefillConfig,
    sharing: MaskSharing,
    ceiling: DensityCeiling | None = None,
    observed_rows: int = 0,
) -> None:
    """Replace the attention of a site by its sparse form, in place.

    Args:
        lifted: What was matched and lifted.
        config: What to select.
        sharing: Of the site's own graph module, which gains the mask_mod and the score_mod as submodules.
        ceiling: Above which density plain causal attention runs dense; None is never.
        observed_rows: How many of its query rows observers see; 0 inserts no observation.
    """
    site = lifted.site
    insert = start_inserting(sharing.graph, site.node)
    with sharing.graph.inserting_before(site.node):
        inputs = [_insert_input(insert, site, x) for x in (site.query, site.key, site.value)]
        if lifted.parts.temperature is not None:
            inputs[0] = insert_temperature(insert, sharing, lifted, inputs[0])
        if config.check_masks and isinstance(site.scores, Masked):
            query, key, _ = inputs
            inputs[0] = insert_mask_check(sharing.graph, sharing.captured, lifted, query, key, site.scores.mask)
        select = _select_causal if lifted.is_plain else _select_masked
        selection = select(insert, lifted, config, sharing, inputs)
        sinks = None if site.sinks is None else insert_sinks(insert, site.sinks)
        output = _insert_attention(insert, sharing, lifted, inputs, selection, sinks, config, ceiling)
        if observed_rows:
            tensors = (output, *inputs)
            output = insert_observation(insert, lifted, sharing, tensors, selection.tables, sinks, observed_rows)
        output = _restore_layout(insert, output, site)
    site.node.replace_all_uses_with(output)
    sharing.graph.erase_node(site.node)


def _insert_input(insert: Insert, site: AttentionSite, x: Node) -> Node:
    """Insert what FlexAttention takes in place of an argument: in the dtype that autocast would have cast it to."""
    if example_of(x).dtype != site.dtype:
        x = insert(torch.ops.aten.to.dtype, x, site.dtype)
    return realize_on_cpu(insert, x, example_of(x).device)


def _select_causal(
    insert: Insert, lifted: LiftedSite, config: SparsePrefillConfig, sharing: MaskSharing, inputs: list[Node]
) -> Selection:
    """Insert the op that selects blocks of causal attention. The op's arguments key inductor's caches."""
    tables = insert(
        torch.ops.flexprefill.select_blocks.default, *inputs, lifted.parts.scale, *config.selection, name="tables"
    )
    length = sharing.captured.measure(inputs[0], inputs[1]).query_length
    mask = insert_submodule(sharing.module, _MASK_MODULE, causal_mask)
    score, score_captures = insert_score(lifted, sharing)
    return Selection(_unpack(insert, tables), (length, length), mask, (), score, score_captures)


def _select_masked(
    insert: Insert, lifted: LiftedSite, config: SparsePrefillConfig, sharing: MaskSharing, inputs: list[Node]
) -> Selection:
    """Insert what the mask's layers share, unless an earlier layer did, and the op that selects blocks under it."""
    parts = lifted.parts
    shared = sharing.describe(lifted, inputs[0], inputs[1])
    bias = sharing.bias_of_representatives(lifted, shared)
    tables = insert(
        torch.ops.flexprefill.select_masked_blocks.default,
        *(*inputs, *shared.facts, bias, parts.scale, parts.softcap),
        *config.selection,
        name="tables",
    )
    score, score_captures = insert_score(lifted, sharing)
    return Selection(
        tables=_unpack(insert, tables),
        lengths=(shared.sizes.query_length, shared.sizes.key_length),
        mask=insert_submodule(sharing.module, shared.name, shared.module),
        mask_captures=shared.captures,
        score=score,
        score_captures=score_captures,
    )


def _unpack(insert: Insert, tables: Node) -> tuple[Node, ...]:
    return tuple(insert(operator.getitem, tables, i, name=name) for i, name in enumerate(BlockTables._fields))


def _insert_attention(
    insert: Insert,
    sharing: MaskSharing,
    lifted: LiftedSite,
    inputs: list[Node],
    selection: Selection,
    sinks: Node | None,
    config: SparsePrefillConfig,
    ceiling: DensityCeiling | None,
) -> Node:
    """Insert attention over the selected blocks, and the sinks if there are any; return the node of its output."""
    device = example_of(inputs[0]).device
    if sinks is not None and are_keys(device):
        inputs, selection = add_sink_block(insert, sharing.module, inputs, selection, sinks, config.block_size)
    attention = _insert_flex_attention(sharing, lifted, inputs, selection, config, ceiling)
    output = realize_on_cpu(insert, insert(operator.getitem, attention, 0), device)
    if sinks is None or are_keys(device):
        return output
    return insert_share_of_keys(insert, output, insert(operator.getitem, attention, 1), sinks)


def _insert_flex_attention(
    sharing: MaskSharing,
    lifted: LiftedSite,
    inputs: list[Node],
    selection: Selection,
    config: SparsePrefillConfig,
    ceiling: DensityCeiling | None,
) -> Node:
    """Insert FlexAttention over the selected blocks; return the node of (output, logsumexp, ...).

    The layout of the op's block-mask tuple changes between torch releases, so a BlockMask of the example tables makes
    it, and the nodes of the tables then take their examples' places.
    """
    examples = [example_of(x) for x in inputs]
    tables = BlockTables(*map(example_of, selection.tables))
    nodes: dict[int, Any] = {id(table): node for table, node in zip(tables, selection.tables, strict=True)}
    _, _, *entries, _ = create_block_mask(
        tables, examples[0].shape[-2], examples[1].shape[-2], config.block_size
    ).as_tuple()
    block_mask = (*selection.lengths, *(nodes.get(id(entry), entry) for entry in entries), selection.mask)
    options = choose_kernel_options(config, *examples, is_plain=lifted.is_bare)
    returns_logsumexp = lifted.site.sinks is not None and not are_keys(examples[0].device)
    options = complete_kernel_options(options, *examples, returns_logsumexp=returns_logsumexp)
    arguments: tuple[Any, ...] = (
        *(*inputs, selection.score, block_mask, lifted.parts.scale, options),
        *(selection.score_captures, selection.mask_captures),
    )
    if ceiling is not None and lifted.is_bare and (ceiling.binds_flash or options.get("BACKEND") != "FLASH"):
        operands = [*inputs, *selection.tables]
        attention = insert_branches(sharing.module, operands, arguments, selection.lengths[0], ceiling)
    else:
        attention = sharing.graph.call_function(flex_attention_hop, arguments)
    query, value = examples[0], examples[2]
    output = query.new_empty(*query.shape[:-1], value.shape[-1])
    output = output.new_empty_strided(output.shape, attention_strides(output, query))
    logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
    attention.meta = lifted.site.node.meta | {"example_value": (output, logsumexp)}
    return attention


def _restore_layout(insert: Insert, output: Node, site: AttentionSite) -> Node:
    """Give the output the shape and the strides that the model's own attention had: views of it may need them."""
    wanted = example_of(site.node)
    if wanted.dim() == 3:
        return insert(torch.flatten, insert(torch.ops.aten.contiguous.default, output), 0, 1)
    if _same_sizes(example_of(output).stride(), wanted.stride()):
        return output
    order = next(filter(partial(_is_memory_order, wanted), itertools.permutations(range(4))), (0, 1, 2, 3))
    dense = insert(torch.ops.aten.contiguous.default, insert(torch.permute, output, order))
    return insert(torch.permute, dense, tuple(map(order.index, range(4))))


def _is_memory_order(tensor: Tensor, order: tuple[int, ...]) -> bool:
    """Tell whether a tensor lies in memory densely, with its dimensions in an order."""
    sizes = [tensor.shape[dim] for dim in order]
    strides = [math.prod(sizes[place + 1 :]) for place in range(len(sizes))]
    return _same_sizes(strides, [tensor.stride(dim) for dim in order])


def _same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))
