"""The search of ``calibrate`` on made-up models: the bound is always kept, and what parts can bear is found."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexprefill_compile.quality.calibration.additive_model import AdditiveModel, Levels
from flexprefill_compile.quality.calibration.ladder import Measure, Measurement, Search

NUM_RUNGS = 5


def make_measure(weights: list[float], *, noise: float = 0.0, coupling: float = 0.0) -> Measure:
    """A model whose loss is a weighted sum over its parts, and perhaps not quite."""

    def measure(levels: Levels) -> Measurement:
        parts = [weight * (NUM_RUNGS - 1 - level) ** 2 for weight, level in zip(weights, levels, strict=True)]
        wobble = random.Random(str(levels)).gauss(0, noise)
        costs = tuple((level + 1) / NUM_RUNGS / len(levels) for level in levels)
        return Measurement(sum(parts) + coupling * sum(parts) ** 2 + wobble, costs)

    return measure


def search(measure: Measure, num_parts: int, max_increase: float, **options: int) -> Search:
    found = Search(measure, num_parts, NUM_RUNGS, max_increase, **options)
    found.run()
    return found


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(-1e-3, 0.05), min_size=1, max_size=12),
    noise=st.floats(0, 0.02),
    coupling=st.floats(0, 5),
    max_increase=st.floats(1e-6, 0.5),
    max_runs=st.integers(0, 60),
)
def test_what_is_chosen_was_measured_and_keeps_the_bound(
    weights: list[float], noise: float, coupling: float, max_increase: float, max_runs: int
) -> None:
    measure = make_measure(weights, noise=noise, coupling=coupling)
    runs: list[Levels] = []

    def counted(levels: Levels) -> Measurement:
        runs.append(levels)
        return measure(levels)

    levels, measurement = Search(counted, len(weights), NUM_RUNGS, max_increase, max_runs).run()
    assert measurement.loss_increase <= max_increase
    assert measurement.cost <= 1 + 1e-9
    assert levels == (NUM_RUNGS - 1,) * len(weights) or measurement == measure(levels)
    assert len(runs) == len(set(runs)) <= max(max_runs, NUM_RUNGS - 1 + len(weights))
    uniform = [measure((rung,) * len(weights)) for rung in range(NUM_RUNGS - 1)]
    assert all(measurement.cost <= each.cost for each in uniform if each.loss_increase <= max_increase)


def test_a_part_that_bears_nothing_stays_near_dense_and_the_others_go_down() -> None:
    levels, measurement = search(make_measure([0.01, 0.01, 1.0, 0.01]), 4, 0.5).best
    assert levels == (0, 0, NUM_RUNGS - 1, 0)
    assert measurement.loss_increase == pytest.approx(0.48)


def test_it_comes_near_the_best_of_all_settings() -> None:
    weights, bound = [0.001, 0.004, 0.002, 0.03], 0.1
    measure = make_measure(weights, coupling=1.0)
    all_levels = [(a, b, c, d) for a in range(5) for b in range(5) for c in range(5) for d in range(5)]
    fitting = [each for each in map(measure, all_levels) if each.loss_increase <= bound]
    assert search(measure, 4, bound).best[1].cost <= min(each.cost for each in fitting) + 1.01 / NUM_RUNGS / 4


def test_a_bound_that_the_cheapest_rung_keeps_needs_no_more_runs() -> None:
    found = search(make_measure([0.001] * 6), 6, 1.0)
    assert found.best[0] == (0,) * 6
    assert len(found.measured) == NUM_RUNGS


def test_a_bound_that_nothing_keeps_is_dense() -> None:
    levels, measurement = search(lambda levels: Measurement(1.0, (0.1,) * 3), 3, 0.5).best
    assert levels == (NUM_RUNGS - 1,) * 3
    assert measurement == Measurement(0.0, (1 / 3,) * 3)


def test_a_rung_that_costs_more_and_loses_more_is_not_used() -> None:
    def measure(levels: Levels) -> Measurement:
        increase = {0: 0.5, 1: 0.9, 2: 0.2, 3: 0.1, 4: 0.0}
        return Measurement(sum(increase[level] for level in levels), tuple((level + 1) / 10 for level in levels))

    found = search(measure, 2, 0.65)
    assert found.best[0] in {(0, 3), (3, 0)}
    assert not any(1 in levels for levels in found.measured if levels != (1, 1))


def test_not_a_number_never_fits() -> None:
    levels, _ = search(lambda levels: Measurement(math.nan, (0.1,) * 2), 2, 0.5).best
    assert levels == (NUM_RUNGS - 1,) * 2


def test_the_model_predicts_uniform_settings_as_measured() -> None:
    model = AdditiveModel([0, 2, 4], [0.3, 0.1, 0.0], [(0.1, 0.1), (0.2, 0.2), (0.5, 0.5)], [0.25, 0.75])
    assert model.choose(0.3) == (0, 0)
    assert model.choose(0.0) == (4, 4)
    assert model.choose(0.16) == (0, 2)
    assert model.list_steps_down((2, 4)) == [(2, 2), (0, 4)]
