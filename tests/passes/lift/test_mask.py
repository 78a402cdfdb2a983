"""Masks become formulas: equal to the materialised mask, element for element, and never where a formula would lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.graphs import find_sites, inspect_graphs, rewrite_graphs
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional as F

from flexprefill_compile.passes.lift.lifted_site import LiftedSite
from flexprefill_compile.passes.lift.scores import ElementFunction
from flexprefill_compile.passes.sparse_prefill import ConfiguredSite, Layers, find_attention
from flexprefill_compile.report import SkipReason
from flexprefill_compile.settings.config import SparsePrefillConfig

BATCH, HEADS, LENGTH = 2, 4, 48
CONFIG_EXACT = SparsePrefillConfig(gamma=1.0, block_size=16, min_budget=0, min_length=16)
CONFIG = SparsePrefillConfig(block_size=16, min_budget=0, min_length=16, max_mask_elements=100_000)
Make = Callable[..., Tensor]


def positions(x: Tensor) -> tuple[Tensor, Tensor]:
    index = torch.arange(x.shape[2], device=x.device)
    return index[None, None, :, None], index[None, None, None, :]


def causal(x: Tensor) -> Tensor:
    query, key = positions(x)
    return key <= query


def pad_of(x: Tensor, pad: Tensor) -> Tensor:
    batch = torch.arange(x.shape[0])[:, None, None, None]
    return pad.to(torch.bool)[batch, positions(x)[1]]


def same_sequence(x: Tensor, position_ids: Tensor) -> Tensor:
    ids = (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    batch = torch.arange(x.shape[0])[:, None, None, None]
    query, key = positions(x)
    return ids[batch, query] == ids[batch, key]


def square(x: Tensor) -> Tensor:
    return torch.ones(x.shape[2], x.shape[2])


def additive(mask: Tensor, lowest: float = float("-inf")) -> Tensor:
    return torch.where(mask, 0.0, lowest)


def distance(x: Tensor) -> Tensor:
    query, key = positions(x)
    return key - query


PAD = torch.ones(BATCH, LENGTH, dtype=torch.long)
PAD[0, :10] = 0
PAD[1, 30:] = 0
IDS = torch.cat([torch.arange(20), torch.arange(28)]).expand(BATCH, -1)
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])

MASKS: dict[str, tuple[Make, tuple[Tensor, ...]]] = {
    "causal": (causal, ()),
    "expanded": (lambda x: causal(x).expand(x.shape[0], 1, -1, -1), ()),
    "padded": (lambda x, pad: causal(x) & pad_of(x, pad), (PAD,)),
    "window": (lambda x: causal(x) & (distance(x) > -8), ()),
    "window and padding": (lambda x, pad: causal(x) & (distance(x) > -8) & pad_of(x, pad), (PAD,)),
    "packed": (lambda x, ids: causal(x) & same_sequence(x, ids), (IDS,)),
    "by position_ids": (lambda x, ids: ids[:, None, None, :] <= ids[:, None, :, None], (IDS.clone(),)),
    "chunked": (lambda x: causal(x) & (positions(x)[0] // 16 == positions(x)[1] // 16), ()),
    "tril": (lambda x: square(x).tril() == 1, ()),
    "tril of bools": (lambda x: square(x).bool().tril(), ()),
    "transposed triu": (lambda x: square(x).bool().triu().mT, ()),
    "triu of -inf": (lambda x: torch.full((x.shape[2], x.shape[2]), float("-inf")).triu(1), ()),
    "masked_fill": (lambda x: torch.zeros(x.shape[2:3] * 2).masked_fill(square(x).triu(1).bool(), float("-inf")), ()),
    "the lowest number": (lambda x: additive(causal(x), torch.finfo(x.dtype).min), ()),
    "one minus the mask": (lambda x: (1.0 - causal(x).to(x.dtype)) * torch.finfo(x.dtype).min, ()),
    "a tensor constant": (lambda x: torch.where(causal(x), torch.tensor(0.0), torch.finfo(x.dtype).min), ()),
    "a slice of a larger one": (lambda x: torch.ones(64, 64).tril().bool()[None, None, : x.shape[2], : x.shape[2]], ()),
    "a slice of a buffer": (
        lambda x, b: b[:, :, : x.shape[2], : x.shape[2]],
        (torch.ones(1, 1, 64, 64).tril().bool(),),
    ),
    "given": (lambda x, mask: mask, (torch.rand(BATCH, 1, LENGTH, LENGTH) > 0.5,)),
    "given, additive": (lambda x, mask: mask, (additive(torch.rand(BATCH, HEADS, LENGTH, LENGTH) > 0.5),)),
    "joined": (lambda x, pad: causal(x) & torch.cat([pad[:, :4] > -1, pad[:, 4:] > 0], 1)[:, None, None], (PAD,)),
    "ALiBi": (lambda x, slopes: additive(causal(x)) + slopes[:, None, None] * distance(x), (SLOPES,)),
    "relative positions": (
        lambda x, table: additive(causal(x)) + table[(-distance(x)[0, 0]).clamp(0, 7)].permute(2, 0, 1),
        (torch.randn(8, HEADS),),
    ),
    "offset in a tensor": (lambda x, offset: positions(x)[1] <= positions(x)[0] + offset, (torch.tensor(5),)),
}


def attend(make: Make) -> Callable[..., Tensor]:
    def call(x: Tensor, *inputs: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=make(x, *inputs))

    return call


def lift(make: Make, *inputs: Tensor, dynamic: bool) -> list[tuple[GraphModule, LiftedSite | Any]]:
    """Return each dynamo graph of a masked attention, and what the mask was lifted to."""

    def find(graph_module: GraphModule) -> tuple[GraphModule, LiftedSite | Any]:
        found = (find_attention(node, CONFIG, {}, Layers(CONFIG, graph_module)) for node in graph_module.graph.nodes)
        (site,) = [x for x in found if x is not None]
        return graph_module, site.lifted if isinstance(site, ConfiguredSite) else site

    x = torch.randn(BATCH, HEADS, LENGTH, 16)
    return inspect_graphs(find, attend(make), x, *inputs, dynamic=dynamic)


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


@pytest.mark.parametrize(
    ("name", "is_packed", "is_given", "is_plain"),
    [
        ("causal", False, False, True),
        ("tril", False, False, True),
        ("transposed triu", False, False, True),
        ("one minus the mask", False, False, True),
        ("padded", False, False, False),
        ("packed", True, False, False),
        ("chunked", True, False, False),
        ("by position_ids", False, False, False),
        ("given", False, True, False),
    ],
)
def test_what_the_formula_of_a_mask_proves(name: str, is_packed: bool, is_given: bool, is_plain: bool) -> None:
    make, inputs = MASKS[name]
    ((_, lifted),) = lift(make, *inputs, dynamic=True)
    bounds = lifted.bounds
    assert (bounds.is_packed, bounds.is_given, bounds.is_plain) == (is_packed, is_given, is_plain)
    assert bounds.is_causal or bounds.is_given


def test_the_offset_of_a_chunk_is_read_from_its_mask() -> None:
    make, inputs = MASKS["offset in a tensor"]
    ((_, lifted),) = lift(make, *inputs, dynamic=False)
    assert str(lifted.bounds.offset) == "capture_1"
    assert lifted.bounds.compute_offset(lifted.parts.mask, inputs, None) == 5


def edited(x: Tensor) -> Tensor:
    mask = square(x).bool().tril()
    mask[:, :4] = True
    return mask


def edited_through_a_view(x: Tensor) -> Tensor:
    mask = square(x).bool().tril()
    mask.view(-1)[:4].logical_not_()
    return mask


def multiplied_in_place(x: Tensor, pad: Tensor) -> Tensor:
    mask = (square(x).tril() == 0) * -1e9
    mask = mask[None, None].expand(x.shape[0], -1, -1, -1).clone()
    mask *= pad[:, None, None, :]
    return mask


@pytest.mark.parametrize(
    ("make", "inputs", "reason"),
    [
        (edited, (), SkipReason.MASK_EDITED),
        (edited_through_a_view, (), SkipReason.MASK_EDITED),
        (multiplied_in_place, (PAD,), SkipReason.MASK_EDITED),
        (lambda x: (square(x).tril() @ square(x)) > 0, (), SkipReason.MASK_NOT_LIFTED),
        (lambda x: causal(x) & causal(x).any(-1, keepdim=True), (), SkipReason.MASK_NOT_LIFTED),
        (lambda x, mask: mask, (torch.ones(LENGTH, LENGTH).tril().bool().repeat(10, 10)[:480, :480],), None),
        (lambda x, pad: pad_of(x, pad).expand(-1, -1, x.shape[2], -1), (PAD,), SkipReason.NOT_CAUSAL),
        (lambda x: causal(x) | (positions(x)[1] < 4), (), SkipReason.NOT_CAUSAL),
        (lambda x: additive(causal(x), -1e9), (), SkipReason.NOT_CAUSAL),
    ],
)
def test_what_is_no_formula_stays_dense_with_the_reason(
    make: Make, inputs: tuple[Tensor, ...], reason: SkipReason | None
) -> None:
    if reason is None:  # a mask that is given, of more elements than max_mask_elements
        x = torch.randn(1, 1, 480, 16)
        (site,) = find_sites(attend(make), x, *inputs, config=CONFIG)
        assert site.reason is SkipReason.MASK_NOT_LIFTED
        assert "230400 elements, more than 100000" in site.detail
        return
    (site,) = find_sites(attend(make), torch.randn(BATCH, HEADS, LENGTH, 16), *inputs, config=CONFIG)
    assert site.reason is reason


def test_layers_share_the_facts_of_one_mask() -> None:
    def layers(x: Tensor, pad: Tensor) -> Tensor:
        mask = causal(x) & pad_of(x, pad)
        for _ in range(3):
            x = F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        return x

    ((graph_module,), sites) = rewrite_graphs(layers, torch.randn(BATCH, HEADS, LENGTH, 16), PAD, config=CONFIG)
    assert [site.rewritten for site in sites] == [True] * 3
    selections = [n for n in graph_module.graph.nodes if n.target is torch.ops.flexprefill.select_masked_blocks.default]
    assert len({n.args[3:13] for n in selections}) == 1
    assert len(selections) == 3
    assert sum(name.startswith("flexprefill_mask") for name, _ in graph_module.named_children()) == 1


def test_a_capture_is_read_when_the_mask_is_built() -> None:
    """A cache that moves its position afterwards does not move the mask."""

    def call(x: Tensor, offset: Tensor) -> Tensor:
        mask = positions(x)[1] <= positions(x)[0] + offset
        offset.add_(100)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    x = torch.randn(BATCH, HEADS, LENGTH, 16)
    expected = call(x, torch.tensor(3))

    ((graph_module,), (site,)) = rewrite_graphs(call, x, torch.tensor(3), config=CONFIG_EXACT)
    assert site.rewritten
    torch.testing.assert_close(graph_module(x, torch.tensor(3))[0], expected)


def test_a_causal_mask_over_more_keys_than_queries_is_not_taken_for_a_prompt() -> None:
    """A cache that is larger than its contents: causal from the first key on, which no causal selection knows."""

    def call(q: Tensor, k: Tensor) -> Tensor:
        mask = torch.arange(q.shape[2])[:, None] >= torch.arange(k.shape[2])
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask)

    q, k = torch.randn(1, 4, LENGTH, 16), torch.randn(1, 4, LENGTH + 40, 16)
    ((graph_module,), (site,)) = rewrite_graphs(call, q, k, config=CONFIG_EXACT)
    assert site.rewritten
    called = [node.target for node in graph_module.graph.nodes]
    assert torch.ops.flexprefill.select_masked_blocks.default in called
    torch.testing.assert_close(graph_module(q, k)[0], call(q, k))
