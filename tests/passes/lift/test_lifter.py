"""Masks become formulas, equal to the materialised mask element for element."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.lifting.lifted_masks import (
    BATCH,
    HEADS,
    LENGTH,
    MASKS,
    lift,
)
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from flexprefill_compile.passes.lift.lifted_site import LiftedSite
from flexprefill_compile.passes.lift.score_parts import ElementFunction


def run_nodes(graph_module: GraphModule, inputs: dict[str, Any]) -> dict[Node, Any]:
    """Run a dynamo graph; return the value of each node."""
    values: dict[Node, Any] = {}

    class Recorder(Interpreter):
        def run_node(self, n: Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    placeholders = graph_module.graph.find_nodes(op="placeholder")
    Recorder(graph_module).run(*(inputs[node.name] for node in placeholders))
    return values


def evaluate(function: ElementFunction | None, lifted: LiftedSite, leaves: list[Any]) -> Tensor | None:
    """Call a lifted function with every index at once."""
    if function is None:
        return None
    values = run_nodes(
        GraphModule(lifted.traced.constants, lifted.traced.graph),
        dict(zip((n.name for n in lifted.traced.graph.find_nodes(op="placeholder")), leaves, strict=True)),
    )
    captures = []
    for capture in function.captures:
        value = values[capture.node]
        if capture.positions:
            value = value[tuple(slice(None) if p is None else p for p in capture.positions)]
        captures.append(value)
    indices = [torch.arange(n).view(-1, *[1] * (3 - dim)) for dim, n in enumerate((BATCH, HEADS, LENGTH, LENGTH))]
    return function.module(*indices, *captures).expand(BATCH, HEADS, LENGTH, LENGTH)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_a_lifted_mask_equals_the_materialised_one(name: str, dynamic: bool) -> None:
    make, inputs = MASKS[name]
    ((graph_module, lifted),) = lift(make, *inputs, dynamic=dynamic)
    assert isinstance(lifted, LiftedSite), lifted

    x = torch.randn(BATCH, HEADS, LENGTH, 16)
    values: dict[str, Any] = {}
    for node in graph_module.graph.find_nodes(op="placeholder"):
        example = node.meta["example_value"]
        if not isinstance(example, Tensor):
            values[node.name] = int(example.node.hint)
        elif example.dim() == 4 and example.shape[-1] == 16:
            values[node.name] = x
        else:
            values[node.name] = inputs[len([v for v in values.values() if isinstance(v, Tensor) and v is not x])]
    ran = run_nodes(graph_module, values)
    leaves = [ran[leaf] for leaf in lifted.traced.leaves]
    expected = make(x, *inputs).expand(BATCH, HEADS, LENGTH, LENGTH)
    visible = evaluate(lifted.parts.mask, lifted, leaves)
    bias = evaluate(lifted.parts.bias, lifted, leaves)
    if expected.dtype == torch.bool:
        assert bias is None
        assert torch.equal(visible, expected)
    else:
        lowest = torch.finfo(expected.dtype).min
        assert torch.equal(visible, expected > lowest)
        added = torch.zeros_like(expected) if bias is None else bias
        torch.testing.assert_close(added[visible], expected[visible], rtol=1e-6, atol=1e-6)
