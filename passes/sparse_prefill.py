"""The pass that the backend runs: match every attention call, rewrite those that can run sparse, report all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from flexprefill_compile.report import Rewritten, Site, Skipped, SkipReason
from flexprefill_compile.settings.config import DensityCeiling, SparsePrefillConfig
from flexprefill_compile.settings.rank_groups import shard_heads

from .base import GraphPass, count_calls, graph_modules
from .graph.nodes import example_of
from .graph.shared_layers import find_shared, split_shared
from .layer_config import (
    check_layers_are_known,
    check_number_of_layers,
    config_for_layer,
    has_settings_by_layer,
    number_layer,
    settings_of_layer,
)
from .lift.lifted_site import LiftedMasks, LiftedSite, lift_site
from .match.attention import match_attention
from .match.site import AttentionSite
from .rewrite.attention import rewrite_attention
from .rewrite.kernel_options import misses_flash, refuse_flash
from .rewrite.mask_sharing import MaskSharing


class SparsePrefillPass(GraphPass):
    """Rewrite prefill attention in place.

    Attributes:
        sites: After the run, what became of each attention call.
    """

    def __init__(
        self,
        config: SparsePrefillConfig,
        failures: Mapping[object, str],
        ceiling: DensityCeiling | None = None,
        observed_rows: int = 0,
    ) -> None:
        """Take what to do.

        Args:
            config: How to select blocks.
            failures: The signatures that inductor could not lower, with its error: they stay dense.
            ceiling: Above which density plain causal attention runs dense; None is never.
            observed_rows: How many query rows of each rewritten attention observers see.
        """
        self.config = config
        self.ceiling = ceiling
        self.failures = failures
        self.observed_rows = observed_rows
        self.sites: list[Site] = []

    def run(self, graph_module: GraphModule) -> None:
        """Rewrite the graph and its child graphs."""
        split_layers(graph_module, self.config)
        layers = Layers(self.config, graph_module)
        for module in graph_modules(graph_module):
            sharing = MaskSharing(module, self.config.block_size)
            for node in list(module.graph.nodes):
                found = find_attention(node, self.config, sharing.lifted, layers)
                if found is not None:
                    site = self._rewrite_site(found, sharing)
                    self.sites += [
                        dataclasses.replace(site, name=name) for name in layers.name_calls(site.name, module.graph)
                    ]
        layers.check()

    def _rewrite_site(self, found: ConfiguredSite | Skipped, sharing: MaskSharing) -> Site:
        if isinstance(found, Skipped):
            return found
        site = found.lifted.site
        if site.signature in self.failures:
            return Skipped(site.name, site.shapes, SkipReason.LOWERING_FAILED, self.failures[site.signature])
        rewrite_attention(found.lifted, found.config, sharing, self.ceiling, self.observed_rows)
        return Rewritten(site.name, site.shapes, misses_flash=_misses_flash(found))


class ConfiguredSite(NamedTuple):
    """A lifted attention site and the settings of its layer."""

    lifted: LiftedSite
    config: SparsePrefillConfig


class Layers:
    """The attention layers of a graph and its child graphs, and their settings.

    Attributes:
        config: The settings, with those by layer.
        met: The number of each attention that was met, None where its name doesn't tell it.
        num_heads: The query heads of one of them, 0 if none was understood.
    """

    def __init__(self, config: SparsePrefillConfig, graph_module: GraphModule) -> None:
        self.config = config
        self.met: list[int | None] = []
        self.num_heads = 0
        self._graph_module = graph_module
        self._num_calls = {module.graph: count for module, count in count_calls(graph_module).items()}
        self._paths = {child.graph: [call.path for call in calls] for child, calls in find_shared(graph_module).items()}

    def name_calls(self, name: str, graph: Graph) -> list[str]:
        """Return the names of an attention, one for each time that its graph runs."""
        paths = [path for path in self._paths.get(graph, ()) if path is not None]
        count = self._num_calls.get(graph, 1)
        if len(paths) < count or not name.startswith(paths[0]):
            return [name] * count
        return [path + name.removeprefix(paths[0]) for path in paths]

    def configure(self, match: AttentionSite | Skipped, graph: Graph) -> SparsePrefillConfig | None:
        """Return the settings of an attention of a graph, None if it stays dense."""
        numbers = [number_layer(name) for name in self.name_calls(match.name, graph)]
        self.met += numbers
        if isinstance(match, Skipped):
            return None
        check_layers_are_known(self.config, match.name, numbers)
        num_heads = int(example_of(match.query).shape[1])
        self.num_heads = shard_heads(num_heads, self.config.tensor_parallel, self.config.sequence_parallel).total
        return config_for_layer(self.config, numbers[0], num_heads)

    def check(self) -> None:
        """Check a policy against all that was met."""
        layers = {layer for layer in self.met if layer is not None}
        if self.num_heads:  # of the skipped ones, the heads are not known
            check_number_of_layers(self.config, layers, self.num_heads, self._graph_module)


def split_layers(graph_module: GraphModule, config: SparsePrefillConfig) -> None:
    """Give layers of other settings graphs of their own, where layers share one."""
    if has_settings_by_layer(config):
        split_shared(graph_module, lambda path: settings_of_layer(config, number_layer(path)))


def find_attention(
    node: Node, config: SparsePrefillConfig, known: LiftedMasks, layers: Layers
) -> ConfiguredSite | Skipped | None:
    """Return the attention that a node stands for, lifted, or why it stays dense, or None for no attention."""
    match = match_attention(node, config)
    if match is None:
        return None
    of_layer = layers.configure(match, node.graph)
    if isinstance(match, Skipped):
        return match
    if of_layer is None:
        return Skipped(match.name, match.shapes, SkipReason.DENSE_LAYER)
    lifted = lift_site(match, config, known)
    if not isinstance(lifted, LiftedSite):
        return Skipped(match.name, match.shapes, *lifted)
    refusal = _refuse_kernel(lifted, of_layer)
    if refusal is not None:
        return Skipped(match.name, match.shapes, SkipReason.KERNEL, refusal)
    return ConfiguredSite(lifted, of_layer)


def _refuse_kernel(lifted: LiftedSite, config: SparsePrefillConfig) -> str | None:
    """Return why a site can't have the kernel that was asked for."""
    if config.kernel_backend != "flash":
        return None
    return refuse_flash(config, *_examples_of(lifted), is_plain=lifted.is_bare)


def _misses_flash(found: ConfiguredSite) -> bool:
    return misses_flash(found.config, *_examples_of(found.lifted), is_plain=found.lifted.is_bare)


def _examples_of(lifted: LiftedSite) -> tuple[Tensor, Tensor, Tensor]:
    """Return the examples of query, key and value, the query as autocast casts it."""
    query, key, value = (example_of(x) for x in (lifted.site.query, lifted.site.key, lifted.site.value))
    return torch.empty_like(query, dtype=lifted.site.dtype), key, value


def find_signatures(graph_module: GraphModule, config: SparsePrefillConfig) -> list[object]:
    """Return the distinct signatures of the sites that the pass would rewrite, in the order of the graph."""
    split_layers(graph_module, config)
    known: LiftedMasks = {}
    layers = Layers(config, graph_module)
    nodes = (node for module in graph_modules(graph_module) for node in module.graph.nodes)
    found = [find_attention(node, config, known, layers) for node in nodes]
    return list(dict.fromkeys(site.lifted.site.signature for site in found if isinstance(site, ConfiguredSite)))
