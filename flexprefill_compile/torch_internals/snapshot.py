"""Copies of dynamo graphs."""

from __future__ import annotations

import copy

from torch.fx import Graph, GraphModule


class GraphSnapshot:
    """A dynamo graph module as it was, to try another rewrite after one that failed."""

    def __init__(self, graph_module: GraphModule) -> None:
        self._graphs = [
            (module, copy_graph(module.graph), {name for name, _ in module.named_children()})
            for module in graph_module.modules()
            if isinstance(module, GraphModule)
        ]

    def restore(self) -> None:
        """Undo what happened to the graph and its child graphs, and drop the submodules that were added."""
        for module, graph, children in self._graphs:
            for name in [name for name, _ in module.named_children() if name not in children]:
                delattr(module, name)
            module.graph = copy_graph(graph)
            module.recompile()


def copy_graph(graph: Graph) -> Graph:
    """Copy a dynamo graph, with what dynamo notes on its inputs."""
    copied = copy.deepcopy(graph)
    for old, new in zip(graph.find_nodes(op="placeholder"), copied.find_nodes(op="placeholder"), strict=True):
        # Dynamo notes where an input comes from on the node itself, which copies only its meta.
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    return copied
