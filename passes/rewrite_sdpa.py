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
from torch.fx import Graph, GraphModule, Node, symbolic_trace
from torch.utils._pytree import tree_map_only

from flexprefill_compile.block_masks.layout import BlockTables
from flexprefill_compile.block_masks.prefill import causal_mask, create_block_mask
from flexprefill_compile.config import SparsePrefillConfig
from flexprefill_compile.passes.cpu_workarounds import realize_on_cpu
from flexprefill_compile.passes.match_sdpa import SdpaSite, example_of
from flexprefill_compile.torch_internals import complete_kernel_options, flex_attention_hop

Insert = Callable[..., Node]

# Fixed names, because inductor's caches key on them.
MASK_MODULE = "flexprefill_causal_mask"
SCORE_MODULE = "flexprefill_identity_score"
# Above it, tiles of several pipeline stages outgrow the shared memory of a GPU.
LARGEST_PIPELINED_ROW_BYTES = 512


def rewrite_sdpa(site: SdpaSite, module: GraphModule, config: SparsePrefillConfig) -> None:
    """Replace the call of a site by its sparse form, in place.

    Args:
        site: A match in ``module``'s own graph.
        module: Its graph module; it gains the mask_mod and the score_mod as submodules.
        config: What to select.
    """
    insert = _start_inserting(module.graph, site.node)
    with module.graph.inserting_before(site.node):
        query, key, value = (_insert_input(insert, site, x) for x in (site.query, site.key, site.value))
        tables = _insert_selection(insert, query, key, value, site.scale, config)
        attention = _insert_attention(module, query, key, value, site.scale, tables, config)
        attention.meta = site.node.meta | {"example_value": (example_of(site.node),)}
        output = insert(operator.getitem, attention, 0)
        output = realize_on_cpu(insert, output, example_of(query).device)
    site.node.replace_all_uses_with(output)
    module.graph.erase_node(site.node)


def _start_inserting(graph: Graph, call: Node) -> Insert:
    """Return a function that adds a call to the graph, with its example value and with the origin of ``call``."""
    origin = {name: call.meta[name] for name in ("nn_module_stack", "stack_trace") if name in call.meta}

    def insert(target: Callable[..., Any], *args: Any, name: str | None = None) -> Node:
        node = graph.create_node("call_function", target, args, name=name)
        with torch.no_grad():
            node.meta = origin | {"example_value": target(*tree_map_only(Node, example_of, args))}
        return node

    return insert


def _insert_input(insert: Insert, site: SdpaSite, x: Node) -> Node:
    """Insert what FlexAttention takes in place of an argument: in the dtype that autocast would have cast it to."""
    if example_of(x).dtype != site.dtype:
        x = insert(torch.ops.aten.to.dtype, x, site.dtype)
    return realize_on_cpu(insert, x, example_of(x).device)


def _insert_selection(
    insert: Insert, query: Node, key: Node, value: Node, scale: float, config: SparsePrefillConfig
) -> tuple[Node, ...]:
    """Insert the op that selects blocks; return the nodes of a BlockTables. The op's arguments key the caches."""
    tables = insert(
        torch.ops.flexprefill.select_blocks.default,
        *(query, key, value, scale),
        *(config.gamma, config.tau, config.min_budget, config.max_budget, config.block_size, config.estimator),
        name="tables",
    )
    return tuple(insert(operator.getitem, tables, i, name=name) for i, name in enumerate(BlockTables._fields))


def _insert_attention(
    module: GraphModule,
    query: Node,
    key: Node,
    value: Node,
    scale: float,
    tables: tuple[Node, ...],
    config: SparsePrefillConfig,
) -> Node:
    """Insert FlexAttention over the selected blocks; return the node of (output, logsumexp, ...).

    The layout of the op's block-mask tuple changes between torch releases, so a BlockMask of the example tables makes
    it, and the nodes of the tables then take their examples' places.
    """
    examples = BlockTables(*map(example_of, tables))
    length = example_of(query).shape[-2]
    nodes: dict[int, Any] = {id(example): node for example, node in zip(examples, tables, strict=True)}
    _, _, *entries, _ = create_block_mask(examples, length, config.block_size).as_tuple()
    if not isinstance(length, int):
        length = module.graph.call_function(torch.ops.aten.sym_size.int, (query, 2))
    mask = _insert_submodule(module, MASK_MODULE, causal_mask)
    block_mask = (length, length, *(nodes.get(id(entry), entry) for entry in entries), mask)

    score = _insert_submodule(module, SCORE_MODULE, _identity_score)
    options = complete_kernel_options(
        _choose_kernel_options(config, example_of(key), example_of(value)),
        *(example_of(x) for x in (query, key, value)),
    )
    return module.graph.call_function(
        flex_attention_hop, (query, key, value, score, block_mask, scale, options, (), ())
    )


def _insert_submodule(module: GraphModule, name: str, function: Callable[..., Tensor]) -> Node:
    if not hasattr(module, name):
        traced = symbolic_trace(function)
        for node in traced.graph.nodes:
            node.type = None  # an annotation that is a string keeps AOTAutograd's cache from hashing the graph
        module.add_submodule(name, traced)
    return module.graph.get_attr(name)


def _identity_score(score: Tensor, batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
    return score


def _choose_kernel_options(config: SparsePrefillConfig, key: Tensor, value: Tensor) -> dict[str, Any]:
    """Return FlexAttention's kernel options: never its decoding kernel, tiles no larger than a mask block.

    The user's ``kernel_options`` come last and win.
    """
    options: dict[str, Any] = {"FORCE_USE_FLEX_ATTENTION": True}
    if key.is_cuda:  # every row meets itself on the diagonal, so that none is masked out altogether
        options["ROWS_GUARANTEED_SAFE"] = True
    row_bytes = max(key.shape[-1], value.shape[-1]) * key.element_size()
    tile = min(config.block_size, 128)
    if key.is_cuda and row_bytes <= 256 and tile >= 64 and torch.cuda.get_device_capability(key.device)[0] == 9:
        # On an H200, 32k tokens, 25 % of the blocks, head dimension 128: 452 TFLOP/s, 387 with inductor's own choice;
        # with blocks of 64, 418 against 398 without TMA. PRESCALE_QK gains less than the spread, and rounds.
        options |= {"BLOCK_M": tile, "BLOCK_N": tile, "num_warps": tile // 16, "num_stages": 3, "USE_TMA": True}
    elif tile < 128:  # inductor's own choice of tiles assumes mask blocks of 128
        options |= {"BLOCK_M": tile, "BLOCK_N": tile}
        if row_bytes > LARGEST_PIPELINED_ROW_BYTES:
            options["num_stages"] = 1
    return options | dict(config.kernel_options)
