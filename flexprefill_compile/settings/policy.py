"""A policy: settings by layer, as ``flexprefill calibrate`` finds them, kept in a JSON file.

    {"format": 1,
     "model": {"architecture": "LlamaForCausalLM", "num_layers": 30, "num_heads": 9},
     "layers": {"0": {"dense": true}, "7": {"gamma": [0.9, 0.95, ...], "min_budget": 512}}}

What a layer does not set, it takes from the config.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checks import (
    InvalidOptionError,
    check,
    check_budgets,
    check_tau,
    is_integer,
    resolve_gamma,
)
from .registry import check_estimator, name_estimator

_FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerPolicy:
    """What differs in one layer; None is as in the config.

    Attributes:
        gamma: As in ``SparsePrefillConfig``, one share or one for each query head.
        tau: Likewise.
        min_budget: Likewise.
        max_budget: Likewise; a layer can have another ceiling than the config's, but not none.
        estimator: Likewise.
        dense: Whether the layer keeps dense attention, whatever else is said of it.

    Raises:
        InvalidOptionError: A value is out of range.
    """

    gamma: float | tuple[float, ...] | None = None
    tau: float | None = None
    min_budget: int | None = None
    max_budget: int | None = None
    estimator: str | None = None
    dense: bool = False

    def __post_init__(self) -> None:
        if self.gamma is not None:
            object.__setattr__(self, "gamma", resolve_gamma(self.gamma))
        if self.tau is not None:
            check_tau(self.tau)
        check_budgets(self.min_budget, self.max_budget)
        if callable(self.estimator):
            object.__setattr__(self, "estimator", name_estimator(self.estimator))
        if self.estimator is not None:
            check_estimator(self.estimator)
        check("dense", self.dense, "True or False", isinstance(self.dense, bool))

    def overrides(self) -> dict[str, Any]:
        """Return the settings that the layer has of its own."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "dense"}
        return {name: value for name, value in values.items() if value is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What a policy remembers of its model.

    Attributes:
        architecture: The name of the model's class.
        num_layers: How many layers it has, counted from 0.
        num_heads: How many query heads a layer has.

    Raises:
        InvalidOptionError: A value is out of range.
    """

    architecture: str
    num_layers: int
    num_heads: int

    def __post_init__(self) -> None:
        check("architecture", self.architecture, "the name of a model's class", isinstance(self.architecture, str))
        check("num_layers", self.num_layers, "a number of layers, at least 1", is_integer(self.num_layers, 1))
        check("num_heads", self.num_heads, "a number of query heads, at least 1", is_integer(self.num_heads, 1))


@dataclasses.dataclass(frozen=True)
class Policy:
    """Settings by layer, for one model.

    Attributes:
        model: What they were found for.
        layers: By the number of the layer. Given as a mapping, kept as its items.

    Raises:
        InvalidOptionError: A layer is beyond the model's, or its gammas are not one for each of the model's heads.
    """

    model: ModelShape
    layers: Mapping[int, LayerPolicy] | tuple[tuple[int, LayerPolicy], ...] = ()

    def __post_init__(self) -> None:
        items = tuple(sorted(dict(self.layers).items()))
        for layer, settings in items:
            is_known = is_integer(layer, 0) and layer < self.model.num_layers
            check("a layer of the policy", layer, f"from 0 to {self.model.num_layers - 1}", is_known)
            check(f"layer {layer} of the policy", settings, "a LayerPolicy", isinstance(settings, LayerPolicy))
            gamma = settings.gamma
            if isinstance(gamma, tuple) and len(gamma) != self.model.num_heads:
                raise InvalidOptionError(
                    f"gamma of layer {layer} must be one number or {self.model.num_heads}, got {len(gamma)} numbers"
                )
        object.__setattr__(self, "layers", items)

    def of_layer(self, layer: int) -> LayerPolicy:
        """Return what is said of a layer."""
        return dict(self.layers).get(layer, LayerPolicy())

    def check_model(self, num_layers: int, num_heads: int) -> None:
        """Check that a model has the shape of the policy's.

        Raises:
            InvalidOptionError: It has another number of layers or heads.
        """
        own = self.model
        if (num_layers, num_heads) != (own.num_layers, own.num_heads):
            raise InvalidOptionError(
                f"policy is for a model of {own.num_layers} layers with {own.num_heads} heads ({own.architecture}), "
                f"got {num_layers} layers with {num_heads} heads"
            )

    def save(self, path: str | Path) -> None:
        """Write the policy to a JSON file."""
        layers = {
            str(layer): settings.overrides() | ({"dense": True} if settings.dense else {})
            for layer, settings in dict(self.layers).items()
        }
        content = {"format": _FORMAT, "model": dataclasses.asdict(self.model), "layers": layers}
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Read a policy from a JSON file.

        Raises:
            InvalidOptionError: There is no such file, or it holds no policy; says what is wrong.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.get("format") != _FORMAT:
                raise InvalidOptionError(f'it must be a JSON object with "format": {_FORMAT}')
            layers = {int(layer): LayerPolicy(**settings) for layer, settings in content["layers"].items()}
            return cls(ModelShape(**content["model"]), layers)
        except KeyError as error:
            raise InvalidOptionError(f"{path} holds no policy: {error} is missing") from None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise InvalidOptionError(f"{path} holds no policy: {_first_line(error)}") from None


def resolve_policy(policy: Any) -> Policy | None:
    """Return the policy that an option stands for: one, or the path of its file.

    Raises:
        InvalidOptionError: It is neither, or the file holds no policy.
    """
    if isinstance(policy, str | Path):
        return Policy.load(policy)
    check("policy", policy, "None, a Policy or the path of its file", policy is None or isinstance(policy, Policy))
    return policy  # type: ignore[no-any-return]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
