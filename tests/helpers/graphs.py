"""Dynamo graphs for tests, without inductor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Interpreter, Node

from flexprefill_compile.passes.base import graph_modules
from flexprefill_compile.passes.graph.operations import operation
from flexprefill_compile.passes.match.attention import match_attention
from flexprefill_compile.passes.match.site import AttentionSite, FlexMods, IsCausal, Logits, Masked
from flexprefill_compile.passes.sparse_prefill import SparsePrefillPass
from flexprefill_compile.report import Site, Skipped
from flexprefill_compile.settings.config import SparsePrefillConfig

Result = TypeVar("Result")
CONFIG = SparsePrefillConfig(block_size=32, min_budget=0, min_length=32, check_masks=True)


def inspect_graphs(
    inspect: Callable[[GraphModule], Result], call: Callable[..., Any], *inputs: Any, dynamic: bool | None = None
) -> list[Result]:
    """Compile and run ``call`` with a backend that inspects each dynamo graph, then runs it as it was."""
    results: list[Result] = []

    def backend(graph_module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        original = GraphModule(graph_module, copy.deepcopy(graph_module.graph))
        results.append(inspect(graph_module))
        return original.forward

    torch._dynamo.reset()
    torch.compile(call, backend=backend, dynamic=dynamic)(*inputs)
    return results


def rewrite_graphs(
    call: Callable[..., Any], *inputs: Any, config: SparsePrefillConfig = CONFIG, dynamic: bool | None = None
) -> tuple[list[GraphModule], list[Site]]:
    """Return the graphs of a call after the pass, and what became of its attention calls."""
    sites: list[Site] = []

    def rewrite(graph_module: GraphModule) -> GraphModule:
        sparse_prefill = SparsePrefillPass(config, failures={})
        sparse_prefill(graph_module)
        sites.extend(sparse_prefill.sites)
        return graph_module

    return inspect_graphs(rewrite, call, *inputs, dynamic=dynamic), sites


def find_sites(
    call: Callable[..., Any], *inputs: Any, config: SparsePrefillConfig = CONFIG, dynamic: bool | None = None
) -> list[Site]:
    """Return what becomes of each attention call."""
    return rewrite_graphs(call, *inputs, config=config, dynamic=dynamic)[1]


def targets(graph_module: GraphModule) -> list[Any]:
    """Return what is called in a graph and its child graphs."""
    nodes = (node for module in graph_modules(graph_module) for node in module.graph.nodes)
    return [node.target for node in nodes if node.op == "call_function"]


def match_graphs(
    call: Callable[..., Any], *inputs: Any, dynamic: bool | None = None, **kwargs: Any
) -> tuple[list[AttentionSite | Skipped], dict[Node, Any]]:
    """Return what every attention of a call is matched as, and the value of each node of its graphs when it ran."""
    matches: list[AttentionSite | Skipped] = []
    values: dict[Node, Any] = {}

    class Recorder(Interpreter):
        def run_node(self, node: Node) -> Any:
            value = super().run_node(node)
            values[node] = value.clone() if isinstance(value, torch.Tensor) else value  # it may be edited later
            return value

    def backend(graph_module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        nodes = (node for module in graph_modules(graph_module) for node in module.graph.nodes)
        matches.extend(match for node in nodes if (match := match_attention(node, CONFIG)) is not None)
        return Recorder(graph_module).run

    torch._dynamo.reset()
    torch.compile(call, backend=backend, dynamic=dynamic)(*inputs, **kwargs)
    return matches, values


def check_site(match: AttentionSite | Skipped | None, values: dict[Node, Any]) -> AttentionSite:
    """Compute the attention that a site describes and compare it with the value of the site's node."""
    assert isinstance(match, AttentionSite), match
    query, key, value = (values[node].to(match.dtype) for node in (match.query, match.key, match.value))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if match.dtype == torch.bfloat16 else {}
    match match.scores:
        case IsCausal():
            output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=match.scale)
        case Masked(mask):
            output = F.scaled_dot_product_attention(query, key, value, values[mask], scale=match.scale)
        case Logits(scores, logits, steps):
            assert match.scale is None
            assert (steps[0], steps[-1]) == (scores, logits)
            logit_values = values[logits].view(*query.shape[:-1], key.shape[-2])
            joined = [logit_values.float()]
            if match.sinks is not None:
                joined.append(values[match.sinks].float().expand(*logit_values.shape[:-1], 1))
            weights = torch.cat(joined, dim=-1).softmax(-1)[..., : logit_values.shape[-1]]
            output = weights.to(match.dtype) @ value
            if operation(scores) != "baddbmm":
                torch.testing.assert_close(
                    values[scores].view_as(logit_values).float(), (query @ key.mT).float(), **tolerance
                )
        case FlexMods():
            return match
    torch.testing.assert_close(output.reshape(values[match.node].shape), values[match.node], **tolerance)
    return match
