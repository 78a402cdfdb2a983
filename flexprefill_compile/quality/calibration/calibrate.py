"""``calibrate``: the cheapest settings by layer that keep a model's loss within a bound."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from ...errors import UsageError
from ...settings.config import SparsePrefillConfig, check_config
from ...settings.policy import LayerPolicy, ModelShape, Policy
from ..sparsity import count_covered
from .additive_model import Levels
from .ladder import Measurement, Search
from .measurement_log import MeasurementLog, describe_code, describe_inputs, hash_of
from .text_measurer import TextMeasurer

# gamma and min_budget of each rung, cheap ones first; dense attention is the rung above them.
RUNGS = (
    *((0.7, 128), (0.8, 256), (0.9, 256), (0.9, 512)),
    *((0.95, 512), (0.95, 1024), (0.98, 1024), (0.99, 2048)),
)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What was found.

    Attributes:
        policy: The settings by layer.
        perplexity_ratio: Of the texts with the policy, over dense attention: measured, at most 1 + the bound.
        density: Mean share of the causal blocks computed, over the layers that can be sparse.
        densities: The same by layer.
        num_runs: Measurements that it took, those that were kept from before among them.
    """

    policy: Policy
    perplexity_ratio: float
    density: float
    densities: dict[int, float]
    num_runs: int


T = TypeVar("T")
OnRun = Callable[[int, bool, Measurement, Measurement], None]


def calibrate(
    model: nn.Module,
    texts: Sequence[Tensor],
    *,
    max_loss_increase: float = 0.01,
    config: SparsePrefillConfig = SparsePrefillConfig(estimator="auto"),
    rungs: Sequence[tuple[float, int]] = RUNGS,
    layers_at_once: int = 1,
    max_runs: int = 100,
    runs_path: Path | None = None,
    on_run: OnRun | None = None,
) -> Calibration:
    """Find the cheapest settings by layer that keep the perplexity of some texts within a bound.

    The model runs uncompiled, once a text for each measurement; ``ladder.py`` says how it searches. What is returned
    was measured as a whole on these texts: it says nothing sure of others.

    Args:
        model: A Hugging Face causal language model with SDPA attention, in inference.
        texts: (1, S) int64 each, longer than the least ``min_budget`` covers, on the model's device.
        max_loss_increase: By how much of itself perplexity may grow, in (0, 1): 0.01 is 1 %.
        config: What the layers have in common: the estimator and block_size.
        rungs: gamma and min_budget of each rung of the ladder.
        layers_at_once: How many neighbouring layers share their settings.
        max_runs: Measurements at most; fewer than the rungs compare settings of the whole model only.
        runs_path: A file that keeps the measurements and spares those that it holds.
        on_run: Called after each: how many there are, whether it was kept from before, what it is, the best so far.

    Raises:
        UsageError: A text is too short, the bound out of range, or no attention of the model can be sparse.
        InvalidOptionError: ``config`` is no ``SparsePrefillConfig``.
    """
    check_config(config)
    check_bound(max_loss_increase)
    if not texts:
        raise UsageError("calibrate must be given a text, got none")
    for number, text in enumerate(texts, start=1):
        check_text(text.shape[1], f"text {number}", config.block_size, rungs)

    measurer = TextMeasurer(model, texts)
    layers, heads = measurer.dense.plain_layers, measurer.dense.heads
    parts = [layers[start : start + layers_at_once] for start in range(0, len(layers), layers_at_once)]
    ladder = [
        *(LayerPolicy(gamma=gamma, min_budget=budget, estimator=str(config.estimator)) for gamma, budget in rungs),
        LayerPolicy(dense=True),
    ]
    log = MeasurementLog(runs_path)
    inputs = [*describe_inputs(model, list(texts)), list(config.selection), describe_code()]

    def measure(levels: Levels) -> Measurement:
        setting = _spread(parts, [ladder[level] for level in levels])
        readable = {str(layer): _describe(layer_policy) for layer, layer_policy in setting.items()}
        key = hash_of(inputs, readable, parts)
        known = log.find(key)
        result = known or _measure(measurer, setting, parts, config)
        if known is None:
            log.add(key, readable, result)
        if on_run:
            on_run(len(search.measured), known is not None, result, search.better_of(result))
        return result

    search = Search(measure, len(parts), len(ladder), math.log1p(max_loss_increase), max_runs)
    levels, best = search.run()
    return Calibration(
        policy=_create_policy(model, heads, _spread(parts, [ladder[level] for level in levels])),
        perplexity_ratio=math.exp(best.loss_increase),
        density=best.cost,
        densities=_spread(
            parts, [cost * len(layers) / len(part) for part, cost in zip(parts, best.costs, strict=True)]
        ),
        num_runs=len(search.measured) - 1,
    )


def _create_policy(model: nn.Module, heads: dict[int, int], chosen: dict[int, LayerPolicy]) -> Policy:
    """Return the policy; layers that could not be measured stay dense in it."""
    shape = ModelShape(
        architecture=type(model).__name__, num_layers=max(heads) + 1, num_heads=heads[next(iter(chosen))]
    )
    return Policy(shape, {layer: LayerPolicy(dense=True) for layer in heads} | chosen)


def check_bound(max_loss_increase: float) -> None:
    """Check the bound.

    Raises:
        UsageError: It is out of range.
    """
    if not 0 < max_loss_increase < 1:
        raise UsageError(f"the bound must be in (0, 1), got {max_loss_increase}")


def check_text(num_tokens: int, name: str, block_size: int, rungs: Sequence[tuple[float, int]] = RUNGS) -> None:
    """Check that the cheapest settings can leave something out of a text.

    Raises:
        UsageError: The least floor of the rungs computes every block of it.
    """
    floor = min(min_budget for _, min_budget in rungs)
    covered = count_covered(floor, block_size)
    if num_tokens <= covered:
        raise UsageError(
            f"{name} must be of more than {covered} tokens, of which min_budget {floor} computes every block, "
            f"got {num_tokens}"
        )


def _spread(parts: list[list[int]], values: list[T]) -> dict[int, T]:
    """Give each layer the value of its part."""
    return {layer: value for part, value in zip(parts, values, strict=True) for layer in part}


def _measure(
    measurer: TextMeasurer, setting: dict[int, LayerPolicy], parts: list[list[int]], config: SparsePrefillConfig
) -> Measurement:
    configs = {layer: dataclasses.replace(config, **own.overrides()) for layer, own in setting.items() if not own.dense}
    increase, densities = measurer.measure(configs)
    return Measurement(increase, tuple(sum(densities[layer] for layer in part) / len(densities) for part in parts))


def _describe(layer: LayerPolicy) -> dict[str, Any]:
    return layer.overrides() | ({"dense": True} if layer.dense else {})
