"""The pass that the backend runs: match every attention call, rewrite those that can run sparse, report all."""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import GraphModule

from flexprefill_compile.config import SparsePrefillConfig
from flexprefill_compile.passes.attention_site import AttentionSite, IsCausal
from flexprefill_compile.passes.base import GraphPass, graph_modules
from flexprefill_compile.passes.match_attention import match_attention
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
            for node in list(module.graph.nodes):
                match = match_attention(node, self.config.min_length)
                if match is not None:
                    self.sites.append(self._rewrite_site(match, module))

    def _rewrite_site(self, match: AttentionSite | Skipped, module: GraphModule) -> Site:
        site = only_causal(match)
        if isinstance(site, Skipped):
            return site
        if site.signature in self.failures:
            return Skipped(site.name, site.shapes, SkipReason.LOWERING_FAILED, self.failures[site.signature])
        rewrite_sdpa(site, module, self.config)
        return Rewritten(site.name, site.shapes)


def only_causal(match: AttentionSite | Skipped) -> AttentionSite | Skipped:
    """Leave a site dense whose scores are more than causal."""
    if isinstance(match, Skipped) or isinstance(match.scores, IsCausal):
        return match
    return Skipped(match.name, match.shapes, SkipReason.EXPLICIT_MASK)


def find_signatures(graph_module: GraphModule, min_length: int) -> list[object]:
    """Return the distinct signatures of the sites that the pass would rewrite, in the order of the graph."""
    matches = (
        match_attention(node, min_length) for module in graph_modules(graph_module) for node in module.graph.nodes
    )
    sites = (only_causal(match) for match in matches if match is not None)
    return list(dict.fromkeys(site.signature for site in sites if isinstance(site, AttentionSite)))
