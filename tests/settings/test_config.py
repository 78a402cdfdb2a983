"""Settings are checked when made, and options split between us and inductor."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from flexprefill_compile import InvalidOptionError, SparsePrefillConfig, explain
from flexprefill_compile.settings.config import split_options
from flexprefill_compile.settings.registry import BUILT_IN


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("gamma", 0, "gamma must be in (0, 1], got 0"),
        ("gamma", 1.5, "gamma must be in (0, 1], got 1.5"),
        (
            "kernel_options",
            "BLOCK_M",
            "kernel_options must be a mapping of FlexAttention's kernel options, got 'BLOCK_M'",
        ),
        ("gamma", float("nan"), "gamma must be in (0, 1], got nan"),
        ("gamma", "0.9", "gamma must be in (0, 1], got '0.9'"),
        ("gamma", True, "gamma must be in (0, 1], got True"),
        ("tau", -0.1, "tau must be in [0, 1], got -0.1"),
        ("min_budget", -1, "min_budget must be a number of tokens, at least 0, got -1"),
        ("min_budget", 1024.0, "min_budget must be a number of tokens, at least 0, got 1024.0"),
        ("block_size", 96, "block_size must be a power of two from 16 to 512, got 96"),
        ("block_size", 8, "block_size must be a power of two from 16 to 512, got 8"),
        ("block_size", 1024, "block_size must be a power of two from 16 to 512, got 1024"),
        ("min_length", 0, "min_length must be None or a number of tokens, at least 1, got 0"),
        ("estimator", "minference", f"estimator must be one of {', '.join(BUILT_IN)}, got 'minference'"),
        ("estimator", ["flexprefill"], f"estimator must be one of {', '.join(BUILT_IN)}, got ['flexprefill']"),
        ("max_density", 0, "max_density must be None or a share of the blocks in (0, 1], got 0"),
        ("max_density", 1.5, "max_density must be None or a share of the blocks in (0, 1], got 1.5"),
        ("kernel_backend", "cutlass", "kernel_backend must be one of auto, triton, flash, got 'cutlass'"),
        ("on_skip", "warn", "on_skip must be one of keep, raise, got 'warn'"),
    ],
)
def test_a_value_out_of_range_is_refused_in_one_sentence(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (the whole message is compared)
        SparsePrefillConfig(**{field: value})
    assert str(raised.value) == message
    assert isinstance(raised.value, InvalidOptionError)


def test_the_papers_estimator_has_the_papers_defaults() -> None:
    config = SparsePrefillConfig(estimator="flexprefill")
    assert (config.gammas, config.floor_at(2**20)) == ([0.95], 1024)
    assert dataclasses.asdict(config) == {
        "gamma": None,
        "tau": 0.1,
        "min_budget": None,
        "max_budget": None,
        "block_size": 128,
        "min_length": None,
        "max_density": None,
        "max_mask_elements": 2**26,
        "check_masks": False,
        "estimator": "flexprefill",
        "dense_last": 0,
        "dense_layers": (),
        "policy": None,
        "on_skip": "keep",
        "kernel_backend": "auto",
        "kernel_options": (),
        "sequence_parallel": None,
        "tensor_parallel": None,
    }


def test_a_config_is_frozen_hashable_and_keyword_only() -> None:
    config = SparsePrefillConfig(gamma=0.9)
    assert len({config, SparsePrefillConfig(gamma=0.9), SparsePrefillConfig()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.gamma = 0.5  # type: ignore[misc]
    with pytest.raises(TypeError):
        SparsePrefillConfig(0.9)  # type: ignore[misc]


def test_options_are_split_by_name() -> None:
    config, forwarded = split_options({"gamma": 0.9, "min-budget": 0, "max-autotune": True}, {"max_autotune"})
    assert config == SparsePrefillConfig(gamma=0.9, min_budget=0)
    assert forwarded == {"max_autotune": True}
    assert split_options(None, ()) == (SparsePrefillConfig(), {})


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidOptionError, match="flexprefill takes gamma, tau, min_budget"):
        split_options({"sparsity": 0.5}, {"max_autotune"})


@pytest.mark.parametrize("options", [SparsePrefillConfig(gamma=0.9), "gamma=0.9", [("gamma", 0.9)], {1: 2}])
def test_options_of_other_types_are_refused_in_one_sentence(options: Any) -> None:
    def attend(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    x = torch.randn(1, 1, 300, 16)
    for call in (
        lambda: split_options(options, ()),
        lambda: torch.compile(attend, backend="flexprefill", options=options)(x),
        lambda: explain(attend, x, options=options),
    ):
        with pytest.raises(InvalidOptionError, match=r"^options must be a mapping of names to values, as .*, got"):
            call()
