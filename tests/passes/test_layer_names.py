"""Which layer an attention is: by name, however the model's forward is wrapped; else settings by layer are refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.graphs import CONFIG, find_sites
from torch import Tensor, nn
from torch.nn import functional as F

from flexprefill_compile import InvalidOptionError, ModelShape, Policy, SkipReason, SparsePrefillConfig
from flexprefill_compile.backend import FlexPrefillBackend

X = torch.randn(1, 2, 64, 16)
DENSE_1 = SparsePrefillConfig(block_size=32, min_budget=0, min_length=32, dense_layers=(1,))
Model = Callable[[Tensor], Tensor]


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


class Layers(nn.Module):
    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor] = lambda layer, x: layer(x)) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"attn": Attention()}) for _ in range(3))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.call(layer["attn"], x)
        return x


def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


class Decorated(Layers):
    forward = decorate(Layers.forward)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Decorated()

    @decorate
    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def hook_layers(model: nn.Module) -> nn.Module:
    """Replace each layer's forward as offloading does."""

    def call(old: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return old(*args, **kwargs)

    for module in model.modules():
        if isinstance(module, Attention):
            module.forward = functools.partial(call, module.forward, module)  # type: ignore[method-assign]
    return model


PREFIX = {
    "a module": (Layers(), "layers"),
    "a method": (Layers().forward, "layers"),
    "a decorated method": (Decorated().forward, "layers"),
    "a decorated module": (Decorated(), "layers"),
    "decorated twice": (Nested(), "model.layers"),
    "a partial": (functools.partial(Decorated().forward), "layers"),
    "hooked layers": (hook_layers(Decorated()), "layers"),
}


@pytest.mark.parametrize(("model", "prefix"), PREFIX.values(), ids=PREFIX)
def test_names_and_settings_by_layer_pass_through_wrappers(model: Model, prefix: str) -> None:
    sites = find_sites(model, X, config=DENSE_1)
    assert [site.name for site in sites] == [f"{prefix}.{number}.attn" for number in range(3)]
    assert [site.reason for site in sites] == [None, SkipReason.DENSE_LAYER, None]


def test_a_function_names_the_modules_that_it_calls() -> None:
    def run(model: Model, x: Tensor) -> Tensor:
        return model(x)

    def run_all(layers: list[Model], x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    assert [site.name for site in find_sites(run, Layers(), X)] == [
        f"model.layers.{number}.attn" for number in range(3)
    ]
    sites = find_sites(run_all, [Attention() for _ in range(3)], X, config=DENSE_1)
    assert [site.name for site in sites] == [f"layers[{number}]" for number in range(3)]
    assert [site.reason for site in sites] == [None, SkipReason.DENSE_LAYER, None]


def run_two_models(models: list[Model], x: Tensor) -> Tensor:
    return models[1](models[0](x))


REGION = torch.compiler.nested_compile_region(lambda layer, x: layer(x))
UNKNOWN = {
    "a layer by itself": (Attention(), (X,)),
    "a function": (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), (X,)),
    "a nested region": (Layers(REGION), (X,)),
    "one of two models": (run_two_models, ([Layers(), Layers()], X)),
}


@pytest.mark.parametrize(("model", "inputs"), UNKNOWN.values(), ids=UNKNOWN)
@pytest.mark.parametrize(
    "settings",
    [{"dense_layers": (1,)}, {"policy": Policy(ModelShape(architecture="A", num_layers=3, num_heads=2))}],
    ids=["dense_layers", "policy"],
)
def test_settings_by_layer_are_refused_where_the_layer_is_not_known(
    model: Model, inputs: tuple[Any, ...], settings: dict[str, Any]
) -> None:
    assert all(site.rewritten for site in find_sites(model, *inputs)), "the scenario: without them it is fine"
    torch._dynamo.reset()
    options = {"block_size": 32, "min_length": 32} | settings
    with pytest.raises(InvalidOptionError, match=r"settings by layer .* compile the whole model"), torch.no_grad():
        torch.compile(model, backend=FlexPrefillBackend(), options=options)(*inputs)


def test_layers_compiled_one_by_one_refuse_settings_by_layer() -> None:
    model = Layers()
    for layer in model.layers:
        layer["attn"].compile(backend=FlexPrefillBackend(), options={"min_length": 32, "dense_layers": [1]})
    with pytest.raises(InvalidOptionError, match="settings by layer"), torch.no_grad():
        model(X)


def test_each_call_of_a_region_has_a_line() -> None:
    assert len(find_sites(Layers(REGION), X, config=CONFIG)) == 3


@pytest.mark.parametrize("model", [Layers(), Decorated()])
def test_a_policy_of_more_layers_is_refused_where_some_are_dense_by_design(model: Model) -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            self.model.layers[0]["attn"](x[:, :, :31])  # type: ignore[attr-defined]
            return self.model(x)

    policy = Policy(ModelShape(architecture="A", num_layers=4, num_heads=2))
    with pytest.raises(InvalidOptionError, match=r"4 layers with 2 heads .*got 3 layers with 2 heads"), torch.no_grad():
        torch.compile(Partly(), backend=FlexPrefillBackend(), options={"min_length": 32, "policy": policy})(X)
