"""The settings of a model's attention layer, out of ``config.flexprefill``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flexprefill_compile.passes.layer_config import check_layers_are_known, config_for_layer

from ...settings.config import SparsePrefillConfig, split_options
from ...settings.device_defaults import resolve_min_length, resolve_selection
from ...settings.policy import Policy
from ...torch_internals import inductor_option_names

_MOST_KEPT = 64


class LayerSettings(NamedTuple):
    """How one attention layer runs.

    Attributes:
        config: What to select, with its ``min_length``; None for a layer that stays dense.
        inductor: Options of inductor.
        max_mask_elements: Largest mask that is read as it is given.
        on_skip: What to do where the layer has to stay dense.
        layer: Its number; None if the module has none.
    """

    config: SparsePrefillConfig | None
    inductor: Mapping[str, Any]
    max_mask_elements: int
    on_skip: str
    layer: int | None


@dataclasses.dataclass
class _Parsed:
    """The settings of one device, out of one mapping of options."""

    options: dict[str, Any]
    device: torch.device
    config: SparsePrefillConfig
    inductor: dict[str, Any]


_parsed: list[_Parsed] = []


def find_layer_settings(module: nn.Module, query: Tensor) -> LayerSettings:
    """Return the settings of an attention layer.

    Args:
        module: With ``config``, whose ``flexprefill`` holds the options; without it the defaults hold.
        query: (B, H, S, D).

    Raises:
        InvalidOptionError: An unknown option, a value out of range, or a policy for another model.
    """
    model_config = getattr(module, "config", None)
    parsed = _parse(getattr(model_config, "flexprefill", None), query.device)
    layer = getattr(module, "layer_idx", None)
    check_layers_are_known(parsed.config, type(module).__name__, [layer])
    policy, num_layers = parsed.config.policy, getattr(model_config, "num_hidden_layers", None)
    if isinstance(policy, Policy) and num_layers is not None and policy.model.num_layers > num_layers:
        policy.check_model(num_layers, query.shape[1])
    config = config_for_layer(parsed.config, layer, query.shape[1])
    if config is not None:
        config = dataclasses.replace(config, dense_layers=(), policy=None)  # they have been heard
    return LayerSettings(config, parsed.inductor, parsed.config.max_mask_elements, parsed.config.on_skip, layer)


def _parse(options: Any, device: torch.device) -> _Parsed:
    """Check the options, once for each mapping and device: a policy is read from its file, lengths from another."""
    for known in _parsed:
        if known.device == device and known.options == (options or {}):
            return known
    config, inductor = split_options(options, _list_inductor_options())
    config = resolve_selection(config, options or {}, device)
    config = resolve_min_length(config, [torch.empty(0, device=device)])
    _parsed.append(_Parsed(dict(options or {}), device, config, inductor))
    del _parsed[:-_MOST_KEPT]
    return _parsed[-1]


@functools.cache
def _list_inductor_options() -> frozenset[str]:
    return inductor_option_names()
