"""The settings of each attention layer: its policy's, where it has some, else the config's."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Hashable, Sequence

from torch.fx import GraphModule

from flexprefill_compile.settings.config import InvalidOptionError, SparsePrefillConfig
from flexprefill_compile.settings.policy import Policy
from flexprefill_compile.settings.rank_groups import shard_heads

# A path of integers and names: model.layers.3.self_attn, layers[3], getattr(layers, '3').
_LAYER_NUMBER = re.compile(r"(?<!\w)\d+(?!\w)")
# One of several modules that a function calls: models[1].layers.3 may be layer 1 or layer 3.
_ONE_OF_SEVERAL = re.compile(r"\w+\[")


def number_layer(name: str) -> int | None:
    """Return the number of an attention's layer, the first one in its name; None if the name doesn't tell it."""
    numbers = _LAYER_NUMBER.findall(name)
    if not numbers or (len(numbers) > 1 and _ONE_OF_SEVERAL.match(name)):
        return None
    return int(numbers[0])


def has_settings_by_layer(config: SparsePrefillConfig) -> bool:
    """Tell whether layers differ in their settings."""
    return bool(config.dense_layers) or isinstance(config.policy, Policy)


def settings_of_layer(config: SparsePrefillConfig, layer: int | None) -> Hashable:
    """Return what layers of equal settings have in common."""
    own = config.policy.of_layer(layer) if isinstance(config.policy, Policy) and layer is not None else None
    return layer in config.dense_layers, own


def config_for_layer(config: SparsePrefillConfig, layer: int | None, num_heads: int) -> SparsePrefillConfig | None:
    """Return the settings of one layer, None for one that stays dense.

    Args:
        config: With its policy, which the result has no more.
        layer: Its number; None only where all layers have the same settings.
        num_heads: The query heads that the attention call has. Over ranks that share a layer's heads, the settings are
            those of the layer's heads, and the result has those of this rank's.

    Raises:
        InvalidOptionError: The policy is for another model, or the gammas are for another number of heads.
    """
    policy = config.policy
    shard = shard_heads(num_heads, config.tensor_parallel, config.sequence_parallel)
    num_heads = shard.total
    if isinstance(policy, Policy) and layer is not None:
        _check_shard(policy.model.num_heads, num_heads)
        policy.check_model(max(policy.model.num_layers, layer + 1), num_heads)
        own = policy.of_layer(layer)
        if own.dense:
            return None
        try:
            config = dataclasses.replace(config, policy=None, **own.overrides())
        except InvalidOptionError as error:
            raise InvalidOptionError(f"layer {layer} of the policy: {error}") from None
    if layer in config.dense_layers:
        return None
    if len(config.gammas) not in (1, num_heads):
        _check_shard(len(config.gammas), num_heads)
        raise InvalidOptionError(
            f"gamma must be one number or one for each of {num_heads} query heads, got {len(config.gammas)} numbers"
        )
    if len(config.gammas) in (1, shard.count):
        return config
    return dataclasses.replace(config, gamma=tuple(config.gammas[shard.start : shard.start + shard.count]))


def _check_shard(expected: int, num_heads: int) -> None:
    """Raise if settings for a whole layer meet what may be one rank's shard of it.

    Raises:
        InvalidOptionError: They are for a multiple of the heads that are known.
    """
    if expected > num_heads and expected % num_heads == 0:
        raise InvalidOptionError(
            f"settings for {expected} query heads meet a layer of {num_heads}; if the layer is sharded over "
            f"{expected // num_heads} ranks, give their group as tensor_parallel"
        )


def check_layers_are_known(config: SparsePrefillConfig, name: str, numbers: Sequence[int | None]) -> None:
    """Check that settings by layer reach the layer that they are meant for.

    Args:
        config: What holds.
        name: Of the attention.
        numbers: Of the layers that call it, None where a name doesn't tell it.

    Raises:
        InvalidOptionError: There are settings by layer, and the attention may be that of any layer.
    """
    if not has_settings_by_layer(config) or (None not in numbers and len(set(numbers)) == len(numbers)):
        return
    which = (
        "there is no single layer number in its path" if None in numbers else f"{len(numbers)} layers share its graph"
    )
    raise InvalidOptionError(
        f"settings by layer (dense_layers, policy) can't be given to attention call {name}: {which}; "
        "compile the whole model, not its layers one by one"
    )


def check_number_of_layers(
    config: SparsePrefillConfig, layers: Collection[int], num_heads: int, graph_module: GraphModule
) -> None:
    """Check a policy against the attention layers of a graph, where the graph is known to hold the whole model.

    That is where it begins with layer 0, not where a graph break left off, and doesn't end at one; dynamo notes both.

    Raises:
        InvalidOptionError: The policy is for a model with more layers.
    """
    reason = getattr(graph_module, "compile_subgraph_reason", None)
    if reason is None or reason.graph_break or min(layers, default=1) > 0:
        return
    is_resumed = any(frame.name.startswith("torch_dynamo_resume") for frame in reason.user_stack)
    if isinstance(config.policy, Policy) and not is_resumed:
        config.policy.check_model(max(layers) + 1, num_heads)
