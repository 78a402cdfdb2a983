"""The values that lifted functions read at run time, put into the graph once: captures and sizes.

    mask_mod(batch, head, query, key, capture_1) = (key <= query) & capture_1[batch, key]

needs ``capture_1``, here a mask of padding. What computes it in the model is repeated where its own inputs end, so that
it exists before the first layer and keeps the value that it has there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node

from flexprefill_compile.block_masks.layout import AttentionSizes

from ..graph.edits import edited_inputs, shares_memory
from ..graph.nodes import example_of
from ..graph.trace import TracedValue, ancestors_of, inline
from ..lift.elements import Capture
from ..lift.score_parts import ElementFunction
from .cpu_workarounds import realize_on_cpu


class CapturedValues:
    """The captures and sizes of one graph, each inserted when it is first asked for."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._captures: dict[object, Any] = {}
        self._sizes: dict[str, Node] = {}

    def read(self, function: ElementFunction, traced: TracedValue) -> tuple[Any, ...]:
        """Return the nodes of a function's captures, with the values that they have where the mask is computed."""
        missing = [c for c in function.captures if self._identify(c, traced) not in self._captures]
        if missing:
            with self._graph.inserting_before(_first_after(traced.leaves, self._graph)):
                nodes = self._insert_captures(missing, traced)
            self._captures |= {self._identify(c, traced): n for c, n in zip(missing, nodes, strict=True)}
        return tuple(self._captures[self._identify(c, traced)] for c in function.captures)

    def measure(self, query: Node, key: Node) -> AttentionSizes:
        """Return the sizes of an attention, symbolic ones as nodes."""
        batch, heads, query_length, _ = example_of(query).shape
        return AttentionSizes(
            batch=self._size(query, 0, batch),
            heads=int(heads),
            query_length=self._size(query, 2, query_length),
            key_length=self._size(key, 2, example_of(key).shape[2]),
        )

    def _size(self, tensor: Node, dim: int, size: Any) -> Any:
        if isinstance(size, int):
            return size
        if str(size) not in self._sizes:
            self._sizes[str(size)] = self._call(torch.ops.aten.sym_size.int, tensor, dim)
        return self._sizes[str(size)]

    def _identify(self, capture: Capture, traced: TracedValue) -> object:
        """Return what two captures have in common if they are one value: their computation and its leaves."""
        computation = _print_computation(
            capture.node, dict(zip(traced.graph.find_nodes(op="placeholder"), traced.leaves, strict=True))
        )
        return computation, capture.positions

    def _insert_captures(self, captures: Sequence[Capture], traced: TracedValue) -> list[Any]:
        leaf_of = dict(zip(traced.graph.find_nodes(op="placeholder"), traced.leaves, strict=True))
        computed = [c for c in captures if c.node not in leaf_of or any(p is not None for p in c.positions)]
        nodes: dict[Capture, Any] = {}
        if computed:
            reader = _CaptureReader(traced, computed)
            inlined = inline(self._graph, reader.read, traced.leaves)
            nodes = {c: self._keep_apart(n) for c, n in zip(computed, inlined, strict=True)}
        for capture in captures:
            if capture not in nodes:
                nodes[capture] = self._snapshot(leaf_of[capture.node])
        return [nodes[capture] for capture in captures]

    def _keep_apart(self, node: Node) -> Node:
        """Keep inductor's CPU template from computing a capture itself."""
        example = example_of(node)
        if not isinstance(example, Tensor):
            return node
        return realize_on_cpu(self._call, node, example.device)

    def _snapshot(self, leaf: Node) -> Node:
        """Copy an input that the graph writes into, later on: caches move their positions."""
        example = example_of(leaf)
        if not isinstance(example, Tensor):
            return leaf
        is_edited = any(shares_memory(edited, example) for node in self._graph.nodes for edited in edited_inputs(node))
        return self._call(torch.clone, leaf) if is_edited else leaf

    def _call(self, target: Any, *args: Any) -> Node:
        node = self._graph.call_function(target, args)
        with torch.no_grad():
            node.meta = {"example_value": target(*map(example_of, args))}
        return node


class _CaptureReader(Interpreter):
    """Runs what computes a mask just as far as its captures, and returns them."""

    def __init__(self, traced: TracedValue, captures: Sequence[Capture]) -> None:
        super().__init__(GraphModule(traced.constants, traced.graph), garbage_collect_values=False)
        self.captures = captures
        self.needed = ancestors_of(*(capture.node for capture in captures))

    def read(self, *leaves: Any) -> tuple[Any, ...]:
        for node, leaf in zip(self.graph.find_nodes(op="placeholder"), leaves, strict=True):
            self.env[node] = leaf
        for node in self.graph.nodes:
            if node in self.needed and node.op != "placeholder":
                self.env[node] = self.run_node(node)
        return tuple(self._select(capture) for capture in self.captures)

    def _select(self, capture: Capture) -> Any:
        value = self.env[capture.node]
        if not capture.positions:
            return value
        return value[tuple(slice(None) if position is None else position for position in capture.positions)]


def _print_computation(node: Node, leaf_of: dict[Node, Node]) -> tuple[str, ...]:
    """Describe how a traced value is computed, so that equal descriptions are equal values."""
    ancestors = ancestors_of(node)
    needed = [n for n in node.graph.nodes if n in ancestors]
    names = {n: f"%{i}" for i, n in enumerate(needed)}
    lines = []
    for n in needed:
        if n in leaf_of:
            lines.append(f"{names[n]} = leaf {leaf_of[n].name}")
        else:
            arguments = torch.fx.map_arg((n.args, n.kwargs), lambda a: cast("Any", names[a]))
            lines.append(f"{names[n]} = {n.target} {arguments}")
    return tuple(lines)


def _first_after(leaves: tuple[Node, ...], graph: Graph) -> Node:
    """Return the first node after all of ``leaves`` and after the inputs, which come first in a graph."""
    remaining = set(leaves)
    node: Node
    for node in graph.nodes:
        if not remaining and node.op not in ("placeholder", "get_attr"):
            return node
        remaining.discard(node)
    raise ValueError("the leaves are not in the graph")
