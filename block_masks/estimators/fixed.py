"""Estimators that read neither queries nor keys: a window of the nearest blocks, and every block."""

from __future__ import annotations

import torch
from torch import Tensor

from flexprefill_compile.settings.config import SparsePrefillConfig

from ..choice import Choice
from ..masks.facts import MaskFacts
from .flexprefill.masked_representative import ScoreRule
from .inputs import EstimatorInputs
from .scoring import choose_known_and_all_others, keep_known


def choose_streaming(inputs: EstimatorInputs, config: SparsePrefillConfig) -> Choice:
    """Choose no block, and score the nearest best: ``min_budget`` then takes the window."""
    nearness = _score_nearness(inputs)
    return Choice(torch.zeros_like(nearness, dtype=torch.bool), nearness, _all_finite(inputs))


def choose_masked_streaming(
    inputs: EstimatorInputs, facts: MaskFacts, rule: ScoreRule, config: SparsePrefillConfig
) -> Choice:
    """Choose the same under a mask."""
    return choose_streaming(keep_known(inputs, facts), config)


def choose_dense(inputs: EstimatorInputs, config: SparsePrefillConfig) -> Choice:
    """Choose every block; under ``max_budget`` the nearest are kept."""
    return Choice(inputs.grid.expand(inputs.shape), _score_nearness(inputs), _all_finite(inputs))


def choose_masked_dense(
    inputs: EstimatorInputs, facts: MaskFacts, rule: ScoreRule, config: SparsePrefillConfig
) -> Choice:
    """Choose every block under a mask; under ``max_budget`` those that the mask crosses are kept first."""
    return choose_known_and_all_others(choose_dense, inputs, facts, config)


def _score_nearness(inputs: EstimatorInputs) -> Tensor:
    """Return 1 for a key block at the queries' own positions, less for blocks further off."""
    num_q_blocks, num_k_blocks = inputs.shape[-2:]
    own = torch.arange(num_q_blocks, device=inputs.grid.device).unsqueeze(-1)
    if inputs.facts is not None:
        own = own + inputs.facts.block_offset
    distance = (own - torch.arange(num_k_blocks, device=inputs.grid.device)).abs()
    return (1 / (1 + distance)).expand(inputs.shape)


def _all_finite(inputs: EstimatorInputs) -> Tensor:
    return torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.grid.device)
