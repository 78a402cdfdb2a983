"""The pass that the backend runs: match every attention call, rewrite those that can run sparse, report all."""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import GraphModule, Node

from flexprefill_compile.config import SparsePrefillConfig
from flexprefill_compile.passes.base import GraphPass, graph_modules
from flexprefill_compile.passes.match_sdpa import SdpaSite, is_sdpa, match_sdpa
from flexprefill_compile.passes.rewrite_sdpa import rewrite_sdpa
from flexprefill_compile.report import Rewritten, Site, Skipped, SkipReason


class SparsePrefillPass(GraphPass):
    """Rewrite prefill attention in place.

    Attributes:
        sites: After the run, what became of each attention call.
    """

    def __init__(self, config: SparsePrefillConfig, failures: Mapping[object, str]) -> None:
        """Take what to do, and the signatures that inductor could not lower, with its error: they stay dense."""
        self.config = config
        self.failures = failures
        self.sites: list[Site] = []

    def run(self, graph_module: GraphModule) -> None:
        """Rewrite the graph and its child graphs."""
        for module in graph_modules(graph_module):
            for node in filter(is_sdpa, list(module.graph.nodes)):
                self.sites.append(self._rewrite_call(node, module))

    def _rewrite_call(self, node: Node, module: GraphModule) -> Site:
        site = match_sdpa(node, self.config.min_length or 1)
        if isinstance(site, Skipped):
            return site
        if site.signature in self.failures:
            return Skipped(site.name, site.shapes, SkipReason.LOWERING_FAILED, self.failures[site.signature])
        rewrite_sdpa(site, module, self.config)
        return Rewritten(site.name, site.shapes)


def find_signatures(graph_module: GraphModule, min_length: int) -> list[object]:
    """Return the distinct signatures of the sites that the pass would rewrite, in the order of the graph."""
    matches = (
        match_sdpa(node, min_length)
        for module in graph_modules(graph_module)
        for node in module.graph.nodes
        if is_sdpa(node)
    )
    return list(dict.fromkeys(match.signature for match in matches if isinstance(match, SdpaSite)))
