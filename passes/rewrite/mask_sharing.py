"""What the selections under one mask share, computed once in the graph for all its layers.

    mask = (key <= query) & pad[batch, key]

becomes, before the first of its layers,

    certain, possible, required, rows, row_mask, ... = a MaskFacts

in which no tensor has S x S elements (mask_facts.py). Then nothing reads the mask itself, and inductor drops it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch.fx import GraphModule, Node

from flexprefill_compile.block_masks.layout import AttentionSizes
from flexprefill_compile.block_masks.masks.facts import MaskFacts

from ..lift.lifted_site import LiftedMasks, LiftedSite
from ..match.site import FlexMods
from .captured_values import CapturedValues
from .mask_facts import insert_bias, insert_facts


@dataclasses.dataclass(frozen=True)
class SharedMask:
    """Nodes that the layers of one mask share.

    Attributes:
        facts: The fields of a MaskFacts.
        captures: What the mask_mod takes after its indices.
        module: The mask_mod.
        name: Of the mask_mod as a submodule.
        sizes: Of the attention calls, nodes or constants.
    """

    facts: MaskFacts
    captures: tuple[Any, ...]
    module: GraphModule
    name: str
    sizes: AttentionSizes


class MaskSharing:
    """Inserts into one graph what each of its masks needs, when a layer first asks.

    Attributes:
        module: The graph's module.
        graph: The graph.
        lifted: What masks of the graph were lifted to.
        captured: What the masks and biases read at run time.
    """

    def __init__(self, module: GraphModule, block_size: int) -> None:
        self.module = module
        self.graph = module.graph
        self.lifted: LiftedMasks = {}
        self.captured = CapturedValues(self.graph)
        self._block_size = block_size
        self._masks: dict[object, SharedMask] = {}
        self._biases: dict[object, Node] = {}
        self._score_names: dict[str, str] = {}

    def describe(self, lifted: LiftedSite, query: Node, key: Node) -> SharedMask:
        """Return what the selections of a site's mask take. New nodes go where the graph is inserting."""
        mask = lifted.parts.mask
        assert mask is not None
        captures = self.captured.read(mask, lifted.traced)
        sizes = self.captured.measure(query, key)
        tables = lifted.site.scores.block_mask if isinstance(lifted.site.scores, FlexMods) else None
        identity = (mask.module.code, captures, sizes, tables and tables[2:6])
        if identity not in self._masks:
            name = f"flexprefill_mask_{len(self._masks) + 1}"
            facts = insert_facts(self.graph, lifted, mask, captures, sizes, tables, self._block_size)
            self._masks[identity] = SharedMask(facts, captures, mask.module, name, sizes)
        return self._masks[identity]

    def bias_of_representatives(self, lifted: LiftedSite, shared: SharedMask) -> Node | None:
        """Return the node of what the model adds to the scores of the representative queries."""
        bias = lifted.parts.bias
        if bias is None:
            return None
        captures = self.captured.read(bias, lifted.traced)
        identity = (bias.module.code, captures, shared.facts.rows)
        if identity not in self._biases:
            self._biases[identity] = insert_bias(self.graph, bias, captures, shared.facts.rows, shared.sizes)
        return self._biases[identity]

    def name_of_score(self, score_mod: GraphModule) -> str:
        """Return the submodule name of a score_mod, one for all that are equal."""
        return self._score_names.setdefault(score_mod.code, f"flexprefill_score_{len(self._score_names) + 1}")
