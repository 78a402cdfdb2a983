"""Give an attention its sinks: each takes its share of a head's softmax and adds nothing to the output.

On a GPU FlexAttention returns the log-sum-exp of the scores of each row, and

    out = out * sigmoid(logsumexp - sinks[head])

is exact. On a CPU it returns none. There a block of keys of zeros goes before the others; every row computes it, its
mask_mod shows the first of its keys alone, and its score_mod gives that one the sink as its score:

    key, value        ->  pad(key, block_size in front), pad(value, block_size in front)
    kv_indices        ->  0, kv_indices + 1
    mask_mod(q, k)    ->  k == 0  or  k >= block_size and mask_mod(q, k - block_size)
    score_mod(s)      ->  sinks[head]  if  k < block_size  else  score_mod(s, k - block_size)

The selection doesn't know of sinks: its blocks reach gamma of the attention to keys. With a sink the share that is left
out is smaller still, since the sink takes part of the softmax and is never left out.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..graph.nodes import example_of
from .cpu_workarounds import realize_on_cpu
from .insertion import Insert, Selection, insert_submodule

aten = torch.ops.aten


def are_keys(device: torch.device) -> bool:
    """Tell whether sinks become keys on a device, because its FlexAttention returns no log-sum-exp."""
    return device.type == "cpu"


def insert_sinks(insert: Insert, sinks: Node) -> Node:
    """Insert the sinks as (H,) float32."""
    flat = insert(torch.ops.aten.to.dtype, insert(torch.flatten, sinks), torch.float32)
    return realize_on_cpu(insert, flat, example_of(flat).device)


def insert_share_of_keys(insert: Insert, output: Node, logsumexp: Node, sinks: Node) -> Node:
    """Insert the product of an output with the share that its keys have of the softmax.

    Args:
        insert: Adds a call to the graph.
        output: (B, H, Sq, Dv), of attention to the keys alone.
        logsumexp: (B, H, Sq) float32, of their scores, to the base 2 as FlexAttention's op gives it.
        sinks: (H,) float32.
    """
    natural = insert(torch.mul, logsumexp, math.log(2))
    share = insert(torch.sigmoid, insert(torch.sub, natural, insert(torch.unsqueeze, sinks, -1)))
    share = insert(aten.to.dtype, insert(torch.unsqueeze, share, -1), example_of(output).dtype)
    return insert(torch.mul, output, share)


def add_sink_block(
    insert: Insert, module: GraphModule, inputs: list[Node], selection: Selection, sinks: Node, block_size: int
) -> tuple[list[Node], Selection]:
    """Put a block of keys before the others, of which the first stands for the sink.

    Args:
        insert: Adds a call to the graph.
        module: The graph's, which gains a mask_mod and a score_mod.
        inputs: Query, key and value.
        selection: Of their blocks.
        sinks: (H,) float32.
        block_size: Of the selection, in tokens.

    Returns:
        What takes the place of the inputs and of the selection.
    """
    query, *keys = inputs
    padded = [insert(torch.nn.functional.pad, x, (0, 0, block_size, 0)) for x in keys]
    padded = [realize_on_cpu(insert, x, example_of(x).device) for x in padded]
    counts, indices, full_counts, full_indices = selection.tables
    later, full_later = (insert(torch.add, columns, 1) for columns in (indices, full_indices))
    tables = (
        insert(torch.add, counts, 1),
        insert(torch.nn.functional.pad, later, (1, 0)),
        full_counts,
        insert(torch.nn.functional.pad, full_later, (0, 1)),  # as wide as the other
    )
    query_length, key_length = selection.lengths
    longer = key_length + block_size if isinstance(key_length, int) else insert(operator.add, key_length, block_size)
    return [query, *padded], Selection(
        tables=tables,
        lengths=(query_length, longer),
        mask=_insert_shifted(module, selection.mask, block_size, _show_first_key),
        mask_captures=selection.mask_captures,
        score=_insert_shifted(module, selection.score, block_size, _read_sink),
        score_captures=(*selection.score_captures, sinks),
    )


# Takes the graph that it writes to, the nodes of head and key, the result for a key of the model, and the block size.
_Join = Callable[[Graph, Node, Node, Node, int], Node]


def _insert_shifted(module: GraphModule, function: Node, block_size: int, join: _Join) -> Node:
    """Insert a mask_mod or score_mod whose keys come after the block of the sink; return its node."""
    original: GraphModule = getattr(module, str(function.target))
    graph = Graph()
    own = original.graph.find_nodes(op="placeholder")
    copies = {node: graph.placeholder(node.name) for node in own}
    _, head, _, key = own[1:5] if own[0].name == "score" else own[:4]
    new_key = copies[key]
    shifted = graph.call_function(aten.sub.Tensor, (new_key, block_size))
    # In the sink's block, which has no key of the model, the model's first key stands in.
    copies[key] = graph.call_function(aten.clamp_min.default, (shifted, 0))
    result: Any = graph.graph_copy(original.graph, dict(copies))
    graph.output(join(graph, copies[head], new_key, result, block_size))
    name = f"{function.target}_after_sink_{block_size}"
    return insert_submodule(module, name, GraphModule({}, graph))


def _show_first_key(graph: Graph, head: Node, key: Node, visible: Node, block_size: int) -> Node:
    is_of_model = graph.call_function(aten.ge.Scalar, (key, block_size))
    is_sink = graph.call_function(aten.eq.Scalar, (key, 0))
    return graph.call_function(
        aten.bitwise_or.Tensor, (is_sink, graph.call_function(aten.bitwise_and.Tensor, (is_of_model, visible)))
    )


def _read_sink(graph: Graph, head: Node, key: Node, score: Node, block_size: int) -> Node:
    sinks = graph.placeholder("sinks")
    sink = graph.call_function(aten.index.Tensor, (sinks, [head]))
    return graph.call_function(aten.where.self, (graph.call_function(aten.lt.Scalar, (key, block_size)), sink, score))
