"""Rewrite an attention call into block selection and FlexAttention over the selected blocks. Never refuses.

    out = scaled_dot_product_attention(q, k, v, is_causal=True)

becomes

    tables = flexprefill.select_blocks(q, k, v, scale, gamma, ...)
    out = flex_attention(q, k, v, identity_score, (S, S, *tables, ..., causal_mask), scale, kernel_options)[0]

The mask_mod runs on every block not proven full, so the result is exact attention over the selected blocks.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node, symbolic_trace
from torch.utils._pytree import tree_map_only

from flexprefill_compile.block_masks.layout import BlockTables
from flexprefill_compile.block_masks.prefill import causal_mask, create_block_mask
from flexprefill_compile.config import SparsePrefillConfig
from flexprefill_compile.passes.cpu_workarounds import realize_on_cpu
from flexprefill_compile.passes.match_sdpa import SdpaSite, example_of
from flexprefill_compile.torch_internals import complete_kernel_options, flex_attention_hop

# Fixed names, because inductor's caches key on them.
MASK_MODULE = "flexprefill_causal_mask"
SCORE_MODULE = "flexprefill_identity_score"


def rewrite_sdpa(site: SdpaSite, module: GraphModule, config: SparsePrefillConfig) -> None:
    """Replace the call of a site by its sparse form, in place.

    Args:
        site: A match in ``module``'s own graph.
        module: Its graph module; it gains the mask_mod and the score_mod as submodules.
        config: What to select.
    """
    graph = module.graph
    device = example_of(site.query).device

    def insert(target: Callable[..., Any], *args: Any) -> Node:
        node = graph.call_function(target, args)
        with torch.no_grad():
            node.meta["example_value"] = target(*tree_map_only(Node, example_of, args))
        return node

    def insert_input(x: Node) -> Node:
        if example_of(x).dtype != site.dtype:  # dense attention casts under autocast
            x = insert(torch.ops.aten.to.dtype, x, site.dtype)
        return realize_on_cpu(insert, x, device)

    with graph.inserting_before(site.node):
        query, key, value = (insert_input(x) for x in (site.query, site.key, site.value))
        scale = site.scale
        if isinstance(scale, Node):  # known at run time only, while the attention kernel wants a constant
            query, scale = insert(operator.mul, query, scale), 1.0
        selection = insert(
            torch.ops.flexprefill.select_blocks.default,
            *(query, key, value, scale, config.gamma, config.tau, config.min_budget, config.max_budget),
            *(config.block_size, config.estimator),
        )
        tables = BlockTables(*(insert(operator.getitem, selection, i) for i in range(len(BlockTables._fields))))
        length = example_of(query).shape[-2]
        block_mask = _describe_block_mask(
            tables,
            length if isinstance(length, int) else insert(torch.ops.aten.sym_size.int, query, 2),
            _insert_submodule(module, MASK_MODULE, causal_mask),
            config.block_size,
        )
        score = _insert_submodule(module, SCORE_MODULE, _identity_score)
        options = complete_kernel_options(
            *map(example_of, (query, key, value)), _choose_kernel_options(config.block_size)
        )
        attention = graph.call_function(
            flex_attention_hop, (query, key, value, score, block_mask, scale, options, (), ())
        )
        output = graph.call_function(operator.getitem, (attention, 0))
        output.meta["example_value"] = example_of(site.node)
        output = realize_on_cpu(insert, output, device)
    site.node.replace_all_uses_with(output)
    graph.erase_node(site.node)


def _describe_block_mask(tables: BlockTables, length: int | Node, mask: Node, block_size: int) -> tuple[Any, ...]:
    """Return the tuple that the FlexAttention op takes for a block mask.

    Its layout changes between torch releases, so a BlockMask of the example tensors makes it; their nodes then take
    their places.
    """
    examples = BlockTables(*map(example_of, tables))
    nodes: dict[int, Any] = {id(example): node for example, node in zip(examples, tables, strict=True)}
    _, _, *rest, _ = create_block_mask(examples, block_size, block_size).as_tuple()
    return (length, length, *(nodes.get(id(entry), entry) for entry in rest), mask)


def _insert_submodule(module: GraphModule, name: str, function: Callable[..., Tensor]) -> Node:
    if not hasattr(module, name):
        traced = symbolic_trace(function)
        for node in traced.graph.nodes:
            node.type = None  # an annotation that is a string keeps AOTAutograd's cache from hashing the graph
        module.add_submodule(name, traced)
    return module.graph.get_attr(name)


def _identity_score(score: Tensor, batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
    return score


def _choose_kernel_options(block_size: int) -> dict[str, Any]:
    """Return FlexAttention's kernel options: never its decoding kernel, and tiles no larger than a mask block."""
    options: dict[str, Any] = {"FORCE_USE_FLEX_ATTENTION": True}
    if block_size < 128:  # inductor's own choice of tiles assumes blocks of 128
        options |= {"BLOCK_M": block_size, "BLOCK_N": block_size}
    return options
