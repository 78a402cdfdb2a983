"""Settings of a vLLM engine: ``additional_config["flexprefill"]``, or the environment variable FLEXPREFILL_OPTIONS."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import torch

from flexprefill_compile.passes.layer_config import check_layers_are_known, config_for_layer, number_layer

from ...settings.checks import InvalidOptionError
from ...settings.config import SparsePrefillConfig, split_options
from ...settings.device_defaults import resolve_min_length, resolve_selection
from ...settings.rank_groups import RankGroup
from ...torch_internals import inductor_option_names

KEY, VARIABLE = "flexprefill", "FLEXPREFILL_OPTIONS"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What holds for all layers of an engine's process.

    Attributes:
        config: With its ``min_length``, its policy and the ranks that share each layer's heads.
        inductor: Options of inductor.
    """

    config: SparsePrefillConfig
    inductor: Mapping[str, Any]

    @property
    def min_length(self) -> int:
        """Tokens of context from which on prefills run sparse."""
        assert self.config.min_length is not None
        return self.config.min_length

    def of_layer(self, name: str, num_heads: int) -> SparsePrefillConfig | None:
        """Return the settings of one layer; None for one that stays dense.

        Args:
            name: As vLLM has it: ``model.layers.3.self_attn.attn``.
            num_heads: Query heads on this rank.

        Raises:
            InvalidOptionError: The settings by layer or head are for another model, or its name has no number.
        """
        layer = number_layer(name)
        check_layers_are_known(self.config, name, [layer])
        config = config_for_layer(self.config, layer, num_heads)
        if config is None:
            return None
        return dataclasses.replace(config, dense_layers=(), policy=None, tensor_parallel=None)  # they have been heard


def read_options(additional_config: Any, environment: Mapping[str, str]) -> Mapping[str, Any]:
    """Return an engine's options: those of ``additional_config`` if it has any, else the environment's.

    Raises:
        InvalidOptionError: They are no mapping.
    """
    if isinstance(additional_config, Mapping) and KEY in additional_config:
        options, source = additional_config[KEY], f"additional_config[{KEY!r}]"
    else:
        options, source = environment.get(VARIABLE) or "{}", VARIABLE
    if isinstance(options, str):
        with contextlib.suppress(json.JSONDecodeError):  # it is refused below, as it was given
            options = json.loads(options)
    if not isinstance(options, Mapping):
        raise InvalidOptionError(f"""{source} must be a JSON object, as '{{"gamma": 0.9}}', got {options!r}""")
    return options


def make_settings(options: Mapping[str, Any], device: torch.device, tensor_parallel: RankGroup | None) -> Settings:
    """Check options, and fill in what depends on the device.

    Args:
        options: The fields of SparsePrefillConfig, and inductor's options.
        device: On which the model runs.
        tensor_parallel: The ranks that share each layer's heads.

    Raises:
        InvalidOptionError: A name is unknown, a value is out of range, or an option has no place in vLLM.
    """
    for name, reason in _HAVE_NO_PLACE.items():
        if name in options:
            raise InvalidOptionError(f"{name} can't be given to vLLM: {reason}")
    config, inductor = split_options(options, inductor_option_names())
    config = resolve_selection(config, options, device)
    config = resolve_min_length(config, [torch.empty(0, device=device)])
    return Settings(dataclasses.replace(config, tensor_parallel=tensor_parallel), inductor)


_HAVE_NO_PLACE = {
    "sequence_parallel": "a prompt is not spread over ranks there",
    "tensor_parallel": "its own tensor parallel ranks are known",
}
