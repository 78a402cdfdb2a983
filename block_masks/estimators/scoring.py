"""Estimators that score blocks: one selection for all of them, the fewest blocks of each row that reach gamma."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from flexprefill_compile.settings.config import SparsePrefillConfig
from flexprefill_compile.settings.registry import find_estimator

from ..choice import Choice
from ..gammas import place_gammas
from ..layout import BlockTables, count_blocks, create_causal_grid
from ..masks.facts import MaskFacts
from ..select import select_cumulative
from .flexprefill.masked_representative import ScoreRule
from .flexprefill.masked_selection import choose_masked_flexprefill
from .inputs import EstimatorInputs
from .kernel_calls import select_scored

Score = Callable[[EstimatorInputs], Tensor]
Choose = Callable[[EstimatorInputs, SparsePrefillConfig], Choice]


def choose_by_score(score: Score, inputs: EstimatorInputs, config: SparsePrefillConfig) -> Choice:
    """Choose the fewest blocks of each row whose scores reach gamma of the row's total.

    Raises:
        ValueError: A user's function returns something else than block scores.
    """
    scores = score(inputs)
    gamma = place_gammas(config, scores.device)
    selected = select_cumulative(scores, gamma if isinstance(gamma, float | int) else gamma.unsqueeze(-1))
    return Choice(selected, scores, torch.isfinite(scores.sum((-2, -1))))


def choose_masked_by_score(
    score: Score, inputs: EstimatorInputs, facts: MaskFacts, rule: ScoreRule, config: SparsePrefillConfig
) -> Choice:
    """Choose the same under a mask; with a bias, which scores don't include, choose by FlexPrefill instead."""
    if rule.bias is not None:
        return choose_masked_flexprefill(inputs, facts, rule, config)
    return choose_known_and_all_others(functools.partial(choose_by_score, score), inputs, facts, config)


def select_by_score(
    score: Score,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    scale: float,
    config: SparsePrefillConfig,
    width: int,
) -> BlockTables | None:
    """Select and pack by Triton kernels, or return None where they don't take the inputs.

    Raises:
        ValueError: A user's function returns something else than block scores.
    """

    def compute_scores() -> Tensor:
        grid = create_causal_grid(count_blocks(query.shape[-2], config.block_size), query.device)
        return score(EstimatorInputs(query, key, scale, config.block_size, grid[None, None]))

    return select_scored(query, key, value, compute_scores, config, width)


def choose_known_and_all_others(
    choose: Choose, inputs: EstimatorInputs, facts: MaskFacts, config: SparsePrefillConfig
) -> Choice:
    """Choose among the blocks of which it is known what the mask hides, and take all the others.

    Of the others, such as the edge of a window, only the mask's own function knows which keys are seen. They are not
    scored: all of them are selected, before any scored block.
    """
    is_known = facts.certain | facts.required
    choice = choose(keep_known(inputs, facts), config)
    selected = choice.selected | ~is_known
    return choice._replace(selected=selected, score=torch.where(is_known, choice.score, torch.inf))


def keep_known(inputs: EstimatorInputs, facts: MaskFacts) -> EstimatorInputs:
    """Return the inputs with a grid of the blocks that the mask leaves whole or that are computed in any case."""
    return dataclasses.replace(inputs, grid=inputs.grid & (facts.certain | facts.required))


def score_by_user(name: str, inputs: EstimatorInputs) -> Tensor:
    """Call a registered function; scores off the grid, and negative ones, count as zero.

    Raises:
        ValueError: It returns no floating point tensor of the right shape.
    """
    score = find_estimator(name)(inputs)
    if not isinstance(score, Tensor) or score.shape != inputs.shape or not score.is_floating_point():
        got = f"{tuple(score.shape)} {score.dtype}" if isinstance(score, Tensor) else type(score).__name__
        raise ValueError(f"estimator {name!r} must return floating point scores of shape {inputs.shape}, got {got}")
    return score.to(inputs.dtype).clamp(min=0).masked_fill(~inputs.grid, 0)
