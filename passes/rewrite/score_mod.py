"""The score_mod that FlexAttention applies: softcap * tanh(score / softcap) + bias, or the score as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ..lift.elements import INDEX_NAMES
from ..lift.lifted_site import LiftedSite
from ..lift.score_parts import ScoreParts
from .insertion import insert_submodule
from .mask_sharing import MaskSharing

_SCORE_MODULE = "flexprefill_identity_score"  # fixed, because inductor's caches key on it


def insert_score(lifted: LiftedSite, sharing: MaskSharing) -> tuple[Node, tuple[Any, ...]]:
    """Insert the score_mod of a site: softcap, then bias. Return its node and its captures."""
    parts = lifted.parts
    if parts.softcap is None and parts.bias is None:
        return insert_submodule(sharing.module, _SCORE_MODULE, _identity_score), ()
    captures = sharing.captured.read(parts.bias, lifted.traced) if parts.bias is not None else ()
    score_mod = _make_score_mod(parts, len(captures))
    return insert_submodule(sharing.module, sharing.name_of_score(score_mod), score_mod), captures


def _make_score_mod(parts: ScoreParts, num_captures: int) -> GraphModule:
    """Write softcap * tanh(score / softcap) + bias as a graph."""
    graph = Graph()
    names = ("score", *INDEX_NAMES, *(f"capture_{number}" for number in range(1, num_captures + 1)))
    score, *arguments = (graph.placeholder(name) for name in names)
    if parts.softcap is not None:
        capped = graph.call_function(torch.ops.aten.div.Tensor, (score, parts.softcap))
        capped = graph.call_function(torch.ops.aten.tanh.default, (capped,))
        score = graph.call_function(torch.ops.aten.mul.Tensor, (capped, parts.softcap))
    if parts.bias is not None:
        source = parts.bias.module.graph
        copies = dict(zip(source.find_nodes(op="placeholder"), arguments, strict=True))
        bias = graph.graph_copy(source, copies)
        score = graph.call_function(torch.ops.aten.add.Tensor, (score, bias))
    graph.output(score)
    return GraphModule({}, graph)


def _identity_score(score: Tensor, batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
    return score
