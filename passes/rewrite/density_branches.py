"""Choose sparse or dense attention at run time, by the density of the selected blocks, with ``torch.cond``.

    attention = flex_attention(q, k, v, ..., (S, S, *tables, ...), ...)

becomes

    is_sparse = flexprefill.is_sparse(kv_num_blocks, full_kv_num_blocks, S, max_density, from_length)
    attention = cond(is_sparse, sparse, dense, (q, k, v, *tables))

in which ``sparse`` holds the FlexAttention and ``dense`` is ``flexprefill.attend_densely``. The host reads one number
a call.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from flexprefill_compile.block_masks.layout import BlockTables
from flexprefill_compile.settings.config import DensityCeiling
from flexprefill_compile.torch_internals import flex_attention_hop

_OPERANDS = ("query", "key", "value", *BlockTables._fields)


def insert_branches(
    module: GraphModule,
    operands: Sequence[Node],
    arguments: tuple[Any, ...],
    length: Any,
    ceiling: DensityCeiling,
) -> Node:
    """Insert the choice where the graph is inserting; return the node of a tuple that starts with the output.

    Args:
        module: Whose graph it is; it gains the branches as submodules.
        operands: Query, key, value and the tables.
        arguments: Of the FlexAttention, in which the operands stand.
        length: Of the prompt: a node or a constant.
        ceiling: Above which density, and from which length on, to run dense.
    """
    graph, choose = module.graph, torch.ops.flexprefill.is_sparse.default
    number = 1 + sum(node.target is choose for node in graph.nodes)
    counts = (operands[3], operands[5])
    is_sparse = graph.call_function(choose, (*counts, length, ceiling.max_density, ceiling.from_length))
    is_sparse.meta["example_value"] = torch.empty((), dtype=torch.bool)
    branches = []
    for kind, branch in (
        ("sparse", _write_sparse_branch(module, operands, arguments)),
        ("dense", _write_dense_branch(scale=arguments[5])),
    ):
        name = f"flexprefill_{kind}_{number}"  # fixed, because inductor's caches key on it
        module.add_submodule(name, branch)
        branches.append(graph.get_attr(name))
    return graph.call_function(torch.ops.higher_order.cond, (is_sparse, *branches, tuple(operands)))


def _write_sparse_branch(module: GraphModule, operands: Sequence[Node], arguments: tuple[Any, ...]) -> GraphModule:
    """Write the FlexAttention as a graph of its own, which measures the length itself."""
    graph = Graph()
    inner = {operand: graph.placeholder(name) for operand, name in zip(operands, _OPERANDS, strict=True)}
    functions: dict[str, Any] = {}

    def translate(node: Node) -> Node:
        if node.op == "get_attr" and node not in inner:
            functions[str(node.target)] = module.get_submodule(str(node.target))
            inner[node] = graph.get_attr(str(node.target))
        elif node not in inner:  # all that is left is the length, where it is symbolic
            inner[node] = graph.call_method("size", (inner[operands[0]], 2))
        return inner[node]

    attention = graph.call_function(flex_attention_hop, map_arg(arguments, translate))
    graph.output((graph.call_function(operator.getitem, (attention, 0)),))
    return GraphModule(functions, graph)


def _write_dense_branch(scale: float) -> GraphModule:
    graph = Graph()
    query, key, value, *_ = (graph.placeholder(name) for name in _OPERANDS)
    output = graph.call_function(torch.ops.flexprefill.attend_densely.default, (query, key, value, scale))
    graph.output((output,))
    return GraphModule({}, graph)
