"""Traced helpers enter a graph without new symbols."""

from __future__ import annotations

import torch
from helpers.graphs import inspect_graphs
from torch import SymInt, Tensor
from torch.fx import GraphModule

from flexprefill_compile.passes.graph.nodes import example_of
from flexprefill_compile.passes.graph.trace import inline


def double(x: Tensor) -> Tensor:
    return x * 2


def test_a_size_that_dynamo_knows_enters_as_a_number() -> None:
    """As a symbol it would have no source, and dynamo could write no guard on what is decided about it."""

    def inspect(module: GraphModule) -> list[object]:
        (x,), graph = module.graph.find_nodes(op="placeholder"), module.graph
        with graph.inserting_before(graph.output_node()):
            size = graph.call_function(torch.ops.aten.sym_size.int, (x, 0))
            size.meta["example_value"] = 5
            (result,) = inline(graph, lambda x, size: (x.new_zeros(size),), (x, size))
        assert result.args[1] == [5]
        return [example_of(node) for node in graph.nodes if node.op != "output"]

    (examples,) = inspect_graphs(inspect, double, torch.ones(5, 3), dynamic=False)
    sizes = [size for example in examples if isinstance(example, Tensor) for size in example.shape]
    assert 5 in sizes
    assert not any(isinstance(x, SymInt) for x in (*examples, *sizes))
