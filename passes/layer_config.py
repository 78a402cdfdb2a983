"""The settings of each attention layer: its policy's, where it has some, else the config's."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch.fx import GraphModule

from flexprefill_compile.settings.config import InvalidOptionError, SparsePrefillConfig
from flexprefill_compile.settings.policy import Policy

# A path of integers and names: model.layers.3.self_attn, layers[3], getattr(layers, '3').
_LAYER_NUMBER = re.compile(r"(?<!\w)\d+(?!\w)")


def number_layer(name: str, ordinal: int) -> int:
    """Return the number of an attention's layer: the first one in its name, else its place in the graph."""
    number = _LAYER_NUMBER.search(name)
    return int(number.group()) if number else ordinal


def config_for_layer(config: SparsePrefillConfig, layer: int, num_heads: int) -> SparsePrefillConfig | None:
    """Return the settings of one layer, None for one that stays dense.

    Args:
        config: With its policy, which the result has no more.
        layer: Its number.
        num_heads: Its query heads.

    Raises:
        InvalidOptionError: The policy is for another model, or the gammas are for another number of heads.
    """
    policy = config.policy
    if isinstance(policy, Policy):
        policy.check_model(max(policy.model.num_layers, layer + 1), num_heads)
        own = policy.of_layer(layer)
        if own.dense:
            return None
        try:
            config = config.override(policy=None, **own.overrides())
        except InvalidOptionError as error:
            raise InvalidOptionError(f"layer {layer} of the policy: {error}") from None
    if layer in config.dense_layers:
        return None
    if len(config.gammas) not in (1, num_heads):
        raise InvalidOptionError(
            f"gamma must be one number or one for each of {num_heads} query heads, got {len(config.gammas)} numbers"
        )
    return config


def check_number_of_layers(
    config: SparsePrefillConfig, layers: Collection[int], num_heads: int, graph_module: GraphModule
) -> None:
    """Check a policy against the attention layers of a graph, where the graph is known to hold the whole model.

    That is where it begins with layer 0 and did not end at a graph break, which dynamo notes.

    Raises:
        InvalidOptionError: The policy is for a model with more layers.
    """
    reason = getattr(graph_module, "compile_subgraph_reason", None)
    is_whole = reason is not None and not reason.graph_break and min(layers, default=1) == 0
    if isinstance(config.policy, Policy) and is_whole:
        config.policy.check_model(max(layers) + 1, num_heads)
