"""Each estimator has defaults of its own, and what follows the device or the length."""

from __future__ import annotations

import pytest
import torch

from flexprefill_compile import LayerPolicy, ModelShape, Policy, SparsePrefillConfig
from flexprefill_compile.passes.layer_config import config_for_layer
from flexprefill_compile.settings import device_defaults
from flexprefill_compile.settings.device_defaults import resolve_selection


def test_none_stands_for_the_estimators_default() -> None:
    assert SparsePrefillConfig().gammas == [0.8]
    assert SparsePrefillConfig(estimator="auto").gammas == [0.95]
    assert SparsePrefillConfig(gamma=0.9).gammas == [0.9]
    assert SparsePrefillConfig(min_budget=0).floor_at(10**6) == 0


def test_a_ceiling_below_the_default_floor_wins() -> None:
    assert SparsePrefillConfig(max_budget=256).floor_at(32768) == 256
    assert SparsePrefillConfig(estimator="flexprefill", max_budget=256).floor_at(32768) == 256


def test_a_layer_with_another_estimator_takes_its_defaults() -> None:
    shape = ModelShape(architecture="M", num_layers=2, num_heads=4)
    policy = Policy(shape, {1: LayerPolicy(estimator="flexprefill")})
    of_layer = config_for_layer(SparsePrefillConfig(policy=policy), 1, 4)
    assert of_layer is not None
    assert (of_layer.gammas, of_layer.floor_at(8192)) == ([0.95], 1024)
    given = config_for_layer(SparsePrefillConfig(gamma=0.7, policy=policy), 1, 4)
    assert given is not None
    assert given.gamma == 0.7


@pytest.mark.parametrize(
    ("options", "device", "has_flash", "expected"),
    [
        ({}, "cuda", False, 64),
        ({}, "cuda", True, 128),
        ({"kernel_backend": "triton"}, "cuda", True, 64),
        ({}, "cpu", False, 128),
        ({"block_size": 128}, "cuda", False, 128),
        ({"estimator": "flexprefill"}, "cuda", False, 128),
    ],
)
def test_blocks_are_finer_on_a_gpu_by_triton(
    options: dict[str, object], device: str, has_flash: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_defaults, "is_flash_available", lambda: has_flash)
    config = SparsePrefillConfig(**options)  # type: ignore[arg-type]
    assert resolve_selection(config, options, torch.device(device)).block_size == expected


CPU = torch.device("cpu")


def test_a_cpu_asks_for_more_unless_gamma_is_given() -> None:
    assert resolve_selection(SparsePrefillConfig(), {}, CPU).gammas == [0.97]
    assert resolve_selection(SparsePrefillConfig(estimator="flexprefill"), {}, CPU).gammas == [0.95]
    assert resolve_selection(SparsePrefillConfig(gamma=0.8), {}, CPU).gammas == [0.8]
    assert resolve_selection(SparsePrefillConfig(), {}, torch.device("cuda")).gammas == [0.8]


def test_a_layer_with_another_estimator_has_its_gamma_on_a_cpu_too() -> None:
    shape = ModelShape(architecture="M", num_layers=4, num_heads=4)
    layers = {
        1: LayerPolicy(estimator="flexprefill"),
        2: LayerPolicy(estimator="auto", gamma=0.5),
        3: LayerPolicy(tau=0),
    }
    config = resolve_selection(SparsePrefillConfig(policy=Policy(shape, layers)), {}, CPU)
    of_layers = [config_for_layer(config, layer, 4) for layer in range(4)]
    assert [own.gammas for own in of_layers if own is not None] == [[0.97], [0.95], [0.5], [0.97]]


def test_options_are_what_differs_from_the_defaults() -> None:
    assert SparsePrefillConfig().as_options() == {}
    options = SparsePrefillConfig(estimator="auto", min_length=64).as_options()
    assert SparsePrefillConfig(**options) == SparsePrefillConfig(estimator="auto", min_length=64)
