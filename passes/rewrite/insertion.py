"""Add calls and submodules to a dynamo graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node, symbolic_trace
from torch.utils._pytree import tree_map_only

from ..graph.nodes import example_of

# Takes a function and its arguments, nodes or constants, and perhaps a name; adds the call and returns its node.
Insert = Callable[..., Node]


def start_inserting(graph: Graph, call: Node) -> Insert:
    """Return a function that adds a call to the graph, with its example value and with the origin of ``call``."""
    origin = {name: call.meta[name] for name in ("nn_module_stack", "stack_trace") if name in call.meta}

    def insert(target: Callable[..., Any], *args: Any, name: str | None = None) -> Node:
        node = graph.create_node("call_function", target, args, name=name)
        with torch.no_grad():
            node.meta = origin | {"example_value": target(*tree_map_only(Node, example_of, args))}
        return node

    return insert


def insert_submodule(module: GraphModule, name: str, function: Callable[..., Tensor] | GraphModule) -> Node:
    """Add a function as a submodule, unless there is one of the name; return a node of it."""
    if not hasattr(module, name):
        traced = function if isinstance(function, GraphModule) else symbolic_trace(function)
        for node in traced.graph.nodes:
            node.type = None  # an annotation that is a string keeps AOTAutograd's cache from hashing the graph
        module.add_submodule(name, traced)
    return module.graph.get_attr(name)
