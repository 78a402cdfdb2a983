"""Every estimator behind one function: from the inputs of an attention call to the blocks it wants.

Those that score blocks, a user's own among them, share the selection: the fewest blocks of each row that reach gamma.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexprefill_compile.settings.config import SparsePrefillConfig
from flexprefill_compile.settings.registry import Estimator, find_estimator

from ..choice import Choice
from ..gammas import place_gammas
from ..select import select_cumulative
from .auto import score_auto
from .inputs import EstimatorInputs
from .sampled import score_sampled
from .xattention import score_xattention

SCORING: dict[str, Estimator] = {"auto": score_auto, "sampled": score_sampled, "xattention": score_xattention}


def choose_blocks(inputs: EstimatorInputs, config: SparsePrefillConfig) -> Choice:
    """Choose blocks by any estimator but ``flexprefill``.

    Raises:
        ValueError: A user's function returns something else than block scores.
    """
    if config.estimator == "streaming":
        nearness = score_nearness(inputs)
        # The floor takes the nearest: they are the window.
        return Choice(torch.zeros_like(nearness, dtype=torch.bool), nearness, _all_finite(inputs))
    if config.estimator == "dense":
        return Choice(inputs.grid.expand(inputs.shape), score_nearness(inputs), _all_finite(inputs))
    score = score_blocks(inputs, config)
    gamma = place_gammas(config, score.device)
    selected = select_cumulative(score, gamma if isinstance(gamma, float | int) else gamma.unsqueeze(-1))
    return Choice(selected, score, torch.isfinite(score.sum((-2, -1))))


def score_blocks(inputs: EstimatorInputs, config: SparsePrefillConfig) -> Tensor:
    """Return the scores of an estimator that scores blocks, (B, H, num_q_blocks, num_k_blocks), zero off the grid.

    Raises:
        ValueError: A user's function returns something else than block scores.
    """
    name = str(config.estimator)
    return SCORING[name](inputs) if name in SCORING else score_by_user(name, inputs)


def looks_at_scores(config: SparsePrefillConfig) -> bool:
    """Tell whether an estimator depends on queries and keys."""
    return config.estimator not in ("streaming", "dense")


def score_nearness(inputs: EstimatorInputs) -> Tensor:
    """Return scores that only say how near a key block is to the queries: 1 for their own, less further off."""
    num_q_blocks, num_k_blocks = inputs.shape[-2:]
    own = torch.arange(num_q_blocks, device=inputs.grid.device).unsqueeze(-1)
    if inputs.facts is not None:
        own = own + inputs.facts.block_offset
    distance = (own - torch.arange(num_k_blocks, device=inputs.grid.device)).abs()
    return (1 / (1 + distance)).expand(inputs.shape)


def score_by_user(name: str, inputs: EstimatorInputs) -> Tensor:
    """Call a user's function; nothing off the grid and nothing negative counts.

    Raises:
        ValueError: It returns no floating point tensor of the right shape.
    """
    score = find_estimator(name)(inputs)
    if not isinstance(score, Tensor) or score.shape != inputs.shape or not score.is_floating_point():
        got = f"{tuple(score.shape)} {score.dtype}" if isinstance(score, Tensor) else type(score).__name__
        raise ValueError(f"estimator {name!r} must return floating point scores of shape {inputs.shape}, got {got}")
    return score.to(inputs.dtype).clamp(min=0).masked_fill(~inputs.grid, 0)


def _all_finite(inputs: EstimatorInputs) -> Tensor:
    return torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.grid.device)
