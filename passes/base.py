"""What every pass shares: it checks the graph it leaves behind, and can show it before and after."""

from __future__ import annotations

import abc
import logging
import time
from collections import Counter

from torch.fx import GraphModule

logger = logging.getLogger(__name__)


class GraphPass(abc.ABC):
    """A rewrite of a dynamo graph in place. Set this module's logger to DEBUG to see graphs and times."""

    def __call__(self, graph_module: GraphModule) -> None:
        """Run the pass, then lint and recompile what it changed."""
        name = type(self).__name__
        self._show(graph_module, f"before {name}")
        start = time.perf_counter()
        self.run(graph_module)
        for module in graph_modules(graph_module):
            module.graph.lint()
            module.recompile()
        logger.debug("%s took %.1f ms", name, (time.perf_counter() - start) * 1e3)
        self._show(graph_module, f"after {name}")

    @abc.abstractmethod
    def run(self, graph_module: GraphModule) -> None:
        """Change the graph, and its child GraphModules, in place."""

    @staticmethod
    def _show(graph_module: GraphModule, when: str) -> None:
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s\n%s", when, graph_module.print_readable(print_output=False))


def graph_modules(graph_module: GraphModule) -> list[GraphModule]:
    """Return the module and the child GraphModules that it uses: branches and bodies of higher-order ops.

    Dynamo leaves graphs behind that nothing uses: of regions that it traced apart, then inlined.
    """
    found = [graph_module]
    for module in found:  # which grows meanwhile
        children = dict(module.named_modules())
        used = (children.get(str(node.target)) for node in module.graph.nodes if node.op in ("get_attr", "call_module"))
        found += [x for x in dict.fromkeys(used) if isinstance(x, GraphModule) and x not in found]
    return found


def count_calls(graph_module: GraphModule) -> Counter[GraphModule]:
    """Count how often each child GraphModule runs in one run of the module, but for loops."""
    counts: Counter[GraphModule] = Counter()
    waiting = [graph_module]
    for module in waiting:  # which grows meanwhile
        for node in module.graph.find_nodes(op="get_attr"):
            child = getattr(module, str(node.target), None)
            if isinstance(child, GraphModule):
                counts[child] += len(node.users)
                waiting.append(child)
    return counts
