"""Confidence intervals against tables, and against what they promise."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexprefill_compile.tasks.confidence import (
    EVERYTHING,
    compute_mean_interval,
    compute_share_interval,
    compute_student_probability,
    compute_wilson_interval,
    find_student_quantile,
)


# Student's t, as printed in tables of statistics.
@pytest.mark.parametrize(
    ("probability", "degrees", "expected"),
    [
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 5, 2.571),
        (0.975, 10, 2.228),
        (0.975, 30, 2.042),
        (0.95, 4, 2.132),
        (0.995, 7, 3.499),
        (0.5, 3, 0.0),
    ],
)
def test_student_quantiles_are_those_of_the_tables(probability: float, degrees: int, expected: float) -> None:
    assert find_student_quantile(probability, degrees) == pytest.approx(expected, abs=5e-4)


@given(st.floats(0.51, 0.999), st.integers(1, 200))
def test_quantile_and_probability_are_inverse(probability: float, degrees: int) -> None:
    quantile = find_student_quantile(probability, degrees)
    assert compute_student_probability(quantile, degrees) == pytest.approx(probability, abs=1e-9)


def test_the_interval_of_a_mean_by_hand() -> None:
    interval = compute_mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    reach = 2.776 * math.sqrt(2.5 / 5)  # t of 4 degrees of freedom times the standard error
    assert (interval.low, interval.high) == (pytest.approx(3 - reach, abs=1e-3), pytest.approx(3 + reach, abs=1e-3))


def test_one_sample_says_nothing() -> None:
    assert compute_mean_interval([-3.0]) == EVERYTHING
    assert not EVERYTHING.is_below(0)
    assert not EVERYTHING.is_above(0)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=20), st.floats(-5, 5))
def test_an_interval_holds_the_mean_and_moves_with_the_data(values: list[float], shift: float) -> None:
    interval, moved = compute_mean_interval(values), compute_mean_interval([value + shift for value in values])
    assert interval.low <= statistics.fmean(values) + 1e-9
    assert interval.high >= statistics.fmean(values) - 1e-9
    assert moved.low == pytest.approx(interval.low + shift, abs=1e-6)
    assert moved.high == pytest.approx(interval.high + shift, abs=1e-6)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    chance = random.Random(0)
    hits = sum(
        not (interval.is_below(0.3) or interval.is_above(0.3))
        for interval in (compute_mean_interval([chance.gauss(0.3, 2) for _ in range(6)]) for _ in range(2000))
    )
    assert hits / 2000 == pytest.approx(0.95, abs=0.015)


# Wilson 1927 as printed by Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I.
@pytest.mark.parametrize(
    ("number", "count", "expected"), [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0, 0.1611))]
)
def test_wilson_intervals_are_the_published_ones(number: int, count: int, expected: tuple[float, float]) -> None:
    interval = compute_wilson_interval(number, count)
    assert (interval.low, interval.high) == pytest.approx(expected, abs=5e-5)


def test_the_paired_interval_by_hand() -> None:
    # 36 samples right with both, 12 with sparse alone, 2 with neither.
    dense, sparse = [True] * 36 + [False] * 14, [True] * 48 + [False] * 2
    interval = compute_share_interval(dense, sparse)
    first, second = compute_wilson_interval(48, 50), compute_wilson_interval(36, 50)
    correlation = (36 * 2 - 0 * 12 - 50 / 2) / math.sqrt(48 * 2 * 36 * 14)
    up, down = 0.96 - first.low, second.high - 0.72
    assert interval.low == pytest.approx(0.24 - math.sqrt(up**2 - 2 * correlation * up * down + down**2))
    assert interval.low > 0


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_a_paired_interval_holds_the_difference_and_is_never_a_point(pairs: list[tuple[bool, bool]]) -> None:
    dense, sparse = zip(*pairs, strict=True)
    interval, swapped = compute_share_interval(dense, sparse), compute_share_interval(sparse, dense)
    difference = statistics.fmean(sparse) - statistics.fmean(dense)
    assert -1 - 1e-9 <= interval.low <= difference + 1e-9
    assert difference - 1e-9 <= interval.high <= 1 + 1e-9
    assert interval.high - interval.low > 0.01
    assert (-swapped.high, -swapped.low) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_losing_every_sample_is_seen_and_losing_one_is_not() -> None:
    assert compute_share_interval([True] * 8, [False] * 8).is_below(0)
    assert not compute_share_interval([True] * 8, [True] * 7 + [False]).is_below(0)
