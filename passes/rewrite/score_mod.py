"""The score_mod that FlexAttention applies: softcap * tanh(score / softcap) + bias, or the score as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ..graph.nodes import example_of
from ..graph.trace import inline
from ..lift.elements import INDEX_NAMES
from ..lift.lifted_site import LiftedSite
from ..lift.score_parts import ScoreParts
from .cpu_workarounds import realize_on_cpu
from .insertion import Insert, insert_submodule
from .mask_sharing import MaskSharing

_SCORE_MODULE = "flexprefill_identity_score"  # fixed, because inductor's caches key on it


def insert_score(lifted: LiftedSite, sharing: MaskSharing) -> tuple[Node, tuple[Any, ...]]:
    """Insert the score_mod of a site: softcap, then bias. Return its node and its captures."""
    parts = lifted.parts
    if parts.softcap is None and parts.bias is None:
        return insert_submodule(sharing.module, _SCORE_MODULE, _identity_score), ()
    captures = sharing.captured.read(parts.bias, lifted) if parts.bias is not None else ()
    score_mod = _make_score_mod(parts, len(captures))
    return insert_submodule(sharing.module, sharing.name_of_score(score_mod), score_mod), captures


def insert_temperature(insert: Insert, sharing: MaskSharing, lifted: LiftedSite, query: Node) -> Node:
    """Insert the product of the queries with a factor of the scores that is data; return its node."""
    temperature = lifted.parts.temperature
    assert temperature is not None
    captures = sharing.captured.read(temperature, lifted)
    sizes = sharing.captured.measure(query, query)

    def scale(query: Tensor, batch: int, heads: int, length: int, *values: Any) -> tuple[Tensor]:
        indices = [
            torch.arange(size, device=query.device).view(-1, *[1] * (3 - dim))
            for dim, size in enumerate((batch, heads, length, 1))
        ]
        return ((query * temperature.module(*indices, *values)).to(query.dtype),)

    (scaled,) = inline(sharing.graph, scale, (query, sizes.batch, sizes.heads, sizes.query_length, *captures))
    return realize_on_cpu(insert, scaled, example_of(query).device)


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
        bias: Any = graph.graph_copy(source, copies)
        # Positions in float64 would make the scores so, which inductor's C++ template reads as float32.
        bias = graph.call_function(torch.ops.aten._to_copy.default, (bias,), {"dtype": torch.float32})
        score = graph.call_function(torch.ops.aten.add.Tensor, (score, bias))
    graph.output(score)
    return GraphModule({}, graph)


def _identity_score(score: Tensor, batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
    return score
