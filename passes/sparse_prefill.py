"""The pass that the backend runs: match every attention call, rewrite those that can run sparse, report all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import GraphModule, Node

from flexprefill_compile.config import DensityCeiling, SparsePrefillConfig
from flexprefill_compile.passes.attention_site import AttentionSite, example_of
from flexprefill_compile.passes.base import GraphPass, graph_modules
from flexprefill_compile.passes.kernel_options import refuse_flash
from flexprefill_compile.passes.lift_site import LiftedMasks, LiftedSite, lift_site
from flexprefill_compile.passes.match_attention import match_attention
from flexprefill_compile.passes.rewrite_attention import rewrite_attention
from flexprefill_compile.passes.share_masks import MaskSharing
from flexprefill_compile.report import Rewritten, Site, Skipped, SkipReason


class SparsePrefillPass(GraphPass):
    """Rewrite prefill attention in place.

    Attributes:
        sites: After the run, what became of each attention call.
    """

    def __init__(
        self, config: SparsePrefillConfig, failures: Mapping[object, str], ceiling: DensityCeiling | None = None
    ) -> None:
        """Take what to do, and the signatures that inductor could not lower, with its error: they stay dense."""
        self.config = config
        self.ceiling = ceiling
        self.failures = failures
        self.sites: list[Site] = []

    def run(self, graph_module: GraphModule) -> None:
        """Rewrite the graph and its child graphs."""
        for module in graph_modules(graph_module):
            sharing = MaskSharing(module, self.config.block_size)
            for node in list(module.graph.nodes):
                found = find_attention(node, self.config, sharing.lifted)
                if found is not None:
                    self.sites.append(self._rewrite_site(found, sharing))

    def _rewrite_site(self, found: LiftedSite | Skipped, sharing: MaskSharing) -> Site:
        if isinstance(found, Skipped):
            return found
        site = found.site
        if site.signature in self.failures:
            return Skipped(site.name, site.shapes, SkipReason.LOWERING_FAILED, self.failures[site.signature])
        rewrite_attention(found, self.config, sharing, self.ceiling)
        return Rewritten(site.name, site.shapes)


def find_attention(node: Node, config: SparsePrefillConfig, known: LiftedMasks) -> LiftedSite | Skipped | None:
    """Return the attention that a node stands for, understood, or why it stays dense, or None for no attention."""
    match = match_attention(node, config)
    if not isinstance(match, AttentionSite):
        return match
    lifted = lift_site(match, config, known)
    if not isinstance(lifted, LiftedSite):
        return Skipped(match.name, match.shapes, *lifted)
    refusal = _refuse_kernel(lifted, config)
    return lifted if refusal is None else Skipped(match.name, match.shapes, SkipReason.KERNEL, refusal)


def _refuse_kernel(lifted: LiftedSite, config: SparsePrefillConfig) -> str | None:
    """Return why a site can't have the kernel that was asked for."""
    if config.kernel_backend != "flash":
        return None
    query, key, value = (example_of(x) for x in (lifted.site.query, lifted.site.key, lifted.site.value))
    query = torch.empty_like(query, dtype=lifted.site.dtype)  # as autocast casts it
    return refuse_flash(config, query, key, value, is_plain=lifted.is_plain)


def find_signatures(graph_module: GraphModule, config: SparsePrefillConfig) -> list[object]:
    """Return the distinct signatures of the sites that the pass would rewrite, in the order of the graph."""
    known: LiftedMasks = {}
    nodes = (node for module in graph_modules(graph_module) for node in module.graph.nodes)
    found = [find_attention(node, config, known) for node in nodes]
    return list(dict.fromkeys(lifted.site.signature for lifted in found if isinstance(lifted, LiftedSite)))
