"""Layers that are compiled once: same results and names, and settings by layer hold."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from helpers.checked_attention import without_code_generation
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from flexprefill_compile import LayerPolicy, ModelShape, Policy, compile_layers_once
from flexprefill_compile.backend import FlexPrefillBackend
from flexprefill_compile.errors import UsageError
from flexprefill_compile.passes.graph.shared_layers import find_shared
from flexprefill_compile.report import Site

NUM_LAYERS = 4
SHAPE = ModelShape(architecture="Model", num_layers=NUM_LAYERS, num_heads=2)
OPTIONS = {"block_size": 32, "min_budget": 0, "min_length": 32}
X = torch.randn(1, 256, 32)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.epsilon = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return attended.transpose(1, 2).flatten(2) + self.epsilon


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x: Tensor, kept: list[Tensor]) -> Tensor:
        x = x + self.attention(x)
        kept.append(x.sum(-1))  # as a cache does
        return x + sum(expert(x) for expert in self.experts)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(NUM_LAYERS))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        kept: list[Tensor] = []
        for layer in self.layers:
            x = layer(x, kept)
        return x, kept


class Run(NamedTuple):
    output: Any
    sites: tuple[Site, ...]
    num_regions: int

    def names(self, *, rewritten: bool) -> list[str]:
        return sorted(site.name for site in self.sites if site.rewritten == rewritten)


def run(model: nn.Module, *, has_code: bool = False, **options: Any) -> Run:
    torch._dynamo.reset()
    backend, graphs = FlexPrefillBackend(), []

    def compile_graph(graph_module: GraphModule, inputs: Any, **settings: Any) -> Any:
        graphs.append(graph_module)
        return backend(graph_module, inputs, **settings)

    compiled = torch.compile(model, backend=compile_graph, options=OPTIONS | options, fullgraph=True)
    with torch.no_grad(), nullcontext() if has_code else without_code_generation(is_dense=False):
        output = compiled(X)
    (graph,) = graphs
    return Run(output, backend.report.sites, len(find_shared(graph)))


def test_layers_share_a_graph_and_give_what_they_gave() -> None:
    expected, actual = run(Model()), run(compile_layers_once(Model()))
    torch.testing.assert_close(actual.output, expected.output)
    assert actual.names(rewritten=True) == [f"layers.{number}.attention" for number in range(NUM_LAYERS)]
    assert (expected.num_regions, actual.num_regions) == (0, 1)


def test_with_generated_code_gamma_1_is_dense() -> None:
    with torch.no_grad():
        expected = Model()(X)
    actual = run(compile_layers_once(Model()), has_code=True, gamma=1.0, dense_layers=(1,))
    torch.testing.assert_close(actual.output, expected, rtol=1e-5, atol=1e-5)
    assert actual.names(rewritten=False) == ["layers.1.attention"]


DENSE_0_AND_2 = {0: LayerPolicy(dense=True), 2: LayerPolicy(dense=True)}
GAMMAS = {number: LayerPolicy(gamma=0.2 + 0.2 * number) for number in range(NUM_LAYERS)}


@pytest.mark.parametrize(
    ("settings", "num_regions"),
    [
        ({"dense_layers": (0, 2)}, 2),
        ({"policy": Policy(SHAPE, DENSE_0_AND_2)}, 2),
        ({"policy": Policy(SHAPE, GAMMAS)}, NUM_LAYERS),
    ],
    ids=["dense_layers", "dense by policy", "gamma by policy"],
)
def test_settings_by_layer_hold(settings: dict[str, Any], num_regions: int) -> None:
    options = {"estimator": "flexprefill", "gamma": 0.5} | settings
    expected, actual = run(Model(), **options), run(compile_layers_once(Model()), **options)
    torch.testing.assert_close(actual.output, expected.output)
    for rewritten in (True, False):
        assert actual.names(rewritten=rewritten) == expected.names(rewritten=rewritten)
    assert actual.num_regions == num_regions


class ManyLayers(nn.Module):
    """Layers that all differ, by a number of theirs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Attention() for _ in range(10))
        for number, layer in enumerate(self.layers):
            layer.epsilon = number

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_layers_that_all_differ_are_compiled_each() -> None:
    expected, actual = run(ManyLayers()), run(compile_layers_once(ManyLayers()))
    torch.testing.assert_close(actual.output, expected.output)
    assert actual.names(rewritten=True) == expected.names(rewritten=True)


def test_uncompiled_copied_or_marked_twice_the_model_is_what_it_was() -> None:
    model = Model()
    expected = model(X)
    marked = compile_layers_once(compile_layers_once(copy.deepcopy(model)))
    torch.testing.assert_close(marked(X), expected)
    torch.testing.assert_close(copy.deepcopy(marked)(X), expected)
    assert not hasattr(marked.layers[0].experts[0], "_flexprefill_region")


def test_what_has_no_layers_is_refused() -> None:
    for model in (nn.Linear(2, 2), nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))})):
        with pytest.raises(UsageError, match=f"{type(model).__name__} has no list of layers of one class"):
            compile_layers_once(model)
    with pytest.raises(UsageError, match=r"model must be an nn\.Module, got function"):
        compile_layers_once(lambda x: x)  # type: ignore[type-var]
