"""Graphs that several layers call: ``torch.compiler.nested_compile_region`` traces the first of them alone.

    a = invoke_subgraph(subgraph_0, "subgraph_0", x)        of model.layers.0
    b = invoke_subgraph(subgraph_0, "subgraph_0", a)        of model.layers.1, whose nodes say model.layers.0

The calls say which layers they are of, if the region is a module's forward.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

from torch.fx import Graph, GraphModule, Node

from flexprefill_compile.torch_internals.regions import invoke_subgraph
from flexprefill_compile.torch_internals.snapshot import copy_graph

from .nodes import name_of

_STACK = "nn_module_stack"


class SharedCall(NamedTuple):
    """A call of a graph.

    Attributes:
        node: The call.
        reference: The get_attr of the graph.
        path: Of the layer, None if the call doesn't tell it.
    """

    node: Node
    reference: Node
    path: str | None


def find_shared(graph_module: GraphModule) -> dict[GraphModule, list[SharedCall]]:
    """Return the child graphs that regions call, each with its calls in order."""
    found: dict[GraphModule, list[SharedCall]] = {}
    for reference in graph_module.graph.find_nodes(op="get_attr"):
        child = getattr(graph_module, str(reference.target), None)
        for node in reference.users:
            if isinstance(child, GraphModule) and node.target is invoke_subgraph:
                path = name_of(node) if node.meta.get(_STACK) else None
                found.setdefault(child, []).append(SharedCall(node, reference, path))
    return found


def split_shared(graph_module: GraphModule, key: Callable[[str], Hashable]) -> None:
    """Give layers that differ graphs of their own, in place.

    Args:
        graph_module: What calls the graphs.
        key: Of a layer's path; layers of the same key keep sharing a graph.
    """
    for child, calls in find_shared(graph_module).items():
        paths = [call.path for call in calls if call.path is not None]
        if len(set(paths)) < len(calls):
            continue
        groups: dict[Hashable, list[SharedCall]] = {}
        for call, path in zip(calls, paths, strict=True):
            groups.setdefault(key(path), []).append(call)
        _, *others = groups.values()
        for group in others:
            _copy_for(group, child, calls[0], graph_module)


def _copy_for(group: list[SharedCall], child: GraphModule, first: SharedCall, graph_module: GraphModule) -> None:
    """Let some calls have a copy of a graph, whose nodes name the first of these calls."""
    copied = GraphModule(child, copy_graph(child.graph))
    copied.meta = dict(child.meta)
    _rename(copied.graph, _last_path(first.node), _last_path(group[0].node))
    name = f"{first.reference.target}_of_{group[0].node.name}"
    graph_module.add_submodule(name, copied)
    for call in group:
        call.reference.target = name
        # Beside the graph, a call has the name by which torch keeps what it compiled.
        call.node.update_arg(1, name)


def _last_path(node: Node) -> str:
    return str(list(node.meta[_STACK].values())[-1][0])


def _rename(graph: Graph, old: str, new: str) -> None:
    for node in graph.nodes:
        stack = node.meta.get(_STACK, {})
        if stack:
            node.meta[_STACK] = {
                key: (new + path.removeprefix(old) if path.startswith(old) else path, kind)
                for key, (path, kind) in stack.items()
            }
