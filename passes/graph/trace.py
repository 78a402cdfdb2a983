"""From a dynamo graph to core ATen and back: trace what computes one value, and put traced code into a graph.

mask: causal[None, None] & pad[:, None, None, :].bool()  ->  unsqueeze, unsqueeze, slice, _to_copy, bitwise_and
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import SymFloat, SymInt, Tensor
from torch.fx import Graph, GraphModule, Node

from flexprefill_compile.torch_internals import FakeTensor, make_fx_under

from .nodes import argument, example_of
from .operations import operation

# A mask's graph is tens of nodes; what is longer depends on the model's own computation.
_MOST_ANCESTORS = 400


@dataclasses.dataclass(frozen=True)
class TracedValue:
    """How a value of a dynamo graph is computed, in functional ATen ops.

    Attributes:
        graph: Placeholders are the leaves, in order; the output is the value.
        leaves: The nodes of the dynamo graph it starts from: inputs, parameters and sizes.
        ancestors: Every node of the dynamo graph that was traced.
        constants: The constant tensors that the graph reads, by name.
        product: The placeholder of the matrix product that the trace was to start from, if any.
    """

    graph: Graph
    leaves: tuple[Node, ...]
    ancestors: tuple[Node, ...]
    constants: dict[str, Tensor]
    product: Node | None = None

    @property
    def output(self) -> Node:
        """The node of the value."""
        (output,) = self.graph.output_node().all_input_nodes
        return output


def trace_value(value: Node, product: Node | None = None) -> TracedValue:
    """Trace what computes a value, from the inputs of its graph on.

    Sizes are leaves, so that a mask that asks the hidden states for their shape doesn't depend on the model.

    Args:
        value: A node of a dynamo graph.
        product: A matrix product to start from as well. Of a baddbmm, its addend is still traced.

    Raises:
        Exception: Whatever tracing raises; the caller takes it for "can't be traced".
    """

    def is_leaf(node: Node) -> bool:
        if node is product:
            return operation(node) != "baddbmm"
        return node.op in ("placeholder", "get_attr") or isinstance(example_of(node), SymInt)

    ancestors = _find_ancestors(value, is_leaf, product)
    if len(ancestors) > _MOST_ANCESTORS:
        raise ValueError(f"computed by {len(ancestors)} operations")
    copied = Graph()
    copies: dict[Node, Any] = {}
    leaves: list[Node] = []
    for node in ancestors:
        if _is_number(node):
            copies[node] = _number_of(node)
        elif is_leaf(node):
            leaves.append(node)
            copies[node] = copied.placeholder(f"leaf_{len(leaves)}")
        elif node is product:
            leaves.append(node)
            copies[node] = _copy_baddbmm(copied, node, copied.placeholder(f"leaf_{len(leaves)}"), copies)
        else:
            copies[node] = copied.node_copy(node, lambda argument: copies[argument])
    copied.output(copies[value])
    owner = value.graph.owning_module
    traced = trace(value.graph, GraphModule(owner if owner is not None else {}, copied), *map(example_of, leaves))
    constants = {str(node.target): getattr(traced, str(node.target)) for node in traced.graph.find_nodes(op="get_attr")}
    placeholders = dict(zip(leaves, traced.graph.find_nodes(op="placeholder"), strict=True))
    start = None if product is None else placeholders[product]
    return TracedValue(traced.graph, tuple(leaves), tuple(ancestors), constants, start)


def _is_number(node: Node) -> bool:
    return isinstance(example_of(node), int | float | SymFloat)


def _number_of(node: Node) -> int | float:
    """Return the constant that a node stands for; float() pins a symbolic one, as dynamo does with an SDPA's scale."""
    example = example_of(node)
    return float(example) if isinstance(example, SymFloat) else example


def _addend_of(baddbmm: Node) -> list[Node]:
    """Return what goes into a baddbmm beside its two factors."""
    inputs = (argument(baddbmm, 0, "input", "self"), baddbmm.kwargs.get("beta"), baddbmm.kwargs.get("alpha"))
    return [x for x in inputs if isinstance(x, Node)]


def _copy_baddbmm(graph: Graph, node: Node, product: Node, copies: dict[Node, Any]) -> Node:
    """Write a baddbmm as a sum: beta * input + alpha * product."""
    addend = copies[argument(node, 0, "input", "self")]
    factors: list[Any] = [node.kwargs.get(name, 1) for name in ("beta", "alpha")]
    beta, alpha = (copies[factor] if isinstance(factor, Node) else factor for factor in factors)
    scaled = [graph.call_function(torch.mul, (x, factor)) for x, factor in ((product, alpha), (addend, beta))]
    return graph.call_function(torch.add, tuple(scaled))


def _find_ancestors(value: Node, is_leaf: Callable[[Node], bool], product: Node | None) -> list[Node]:
    found: set[Node] = set()
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            if not is_leaf(node) and not _is_number(node):
                waiting.extend(_addend_of(node) if node is product else node.all_input_nodes)
    return [node for node in value.graph.nodes if node in found]


def ancestors_of(*nodes: Node) -> set[Node]:
    """Return the nodes of a graph that some nodes are computed from, themselves included."""
    found: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found


def trace(graph: Graph, function: Callable[..., Any], *examples: Any) -> GraphModule:
    """Trace a function into ATen ops, on the examples and in the fake mode of a dynamo graph.

    Raises:
        TypeError: An example is a plain number. It would become a symbol that comes from nowhere, in the symbols of
            the model, and dynamo can't write a guard on such a one: ``bind_number`` gives what to trace with instead.
    """
    if numbers := [example for example in examples if isinstance(example, int | float)]:
        raise TypeError(f"examples must be tensors or symbols, got {numbers}")
    fake_mode = next(e.fake_mode for node in graph.nodes if isinstance(e := example_of(node), FakeTensor))
    return make_fx_under(fake_mode, function, *examples)


def bind_number(argument: Any) -> Any:
    """Return the number that a node stands for, if dynamo knows it; everything else as it is."""
    if isinstance(argument, Node) and isinstance(example_of(argument), int | float):
        return example_of(argument)
    return argument


def inline(graph: Graph, function: Callable[..., Any], arguments: Sequence[Any]) -> list[Node]:
    """Trace a function of tensors and sizes, and insert it where ``graph`` is inserting.

    Args:
        graph: A dynamo graph.
        function: Plain torch code, or a GraphModule; returns a flat sequence of tensors.
        arguments: Nodes of the graph, or constants.

    Returns:
        The nodes of what it returns.
    """
    arguments = [bind_number(argument) for argument in arguments]
    nodes = [argument for argument in arguments if isinstance(argument, Node)]

    def call(*values: Any) -> tuple[Any, ...]:
        remaining = iter(values)
        return tuple(function(*(next(remaining) if isinstance(a, Node) else a for a in arguments)))

    traced = trace(graph, call, *map(example_of, nodes))
    traced.graph.eliminate_dead_code()
    copies: dict[Node, Node] = dict(zip(traced.graph.find_nodes(op="placeholder"), nodes, strict=True))
    for node in traced.graph.nodes:
        if node.op == "call_function":
            copies[node] = graph.node_copy(node, lambda argument: copies[argument])
            copies[node].meta = {"example_value": node.meta["val"]}
        elif node.op == "get_attr":
            raise ValueError(f"a constant tensor, {node.target}, can't be put into another graph")
    (results,) = traced.graph.output_node().args
    return [copies[result] for result in results]  # type: ignore[union-attr, index]
