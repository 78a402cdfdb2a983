"""Cumulative selection and budgets."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexprefill_compile.block_masks.layout import create_causal_grid
from flexprefill_compile.block_masks.select import apply_budget, select_cumulative

# Whole numbers and a gamma of few bits: every sum and product below is exact, in float32 inputs as well.
masses = st.lists(st.integers(0, 50), min_size=1, max_size=40)
gammas = st.integers(1, 64).map(lambda numerator: numerator / 64)
dtypes = st.sampled_from([torch.float32, torch.float64])


@settings(deadline=None, max_examples=100)
@given(mass=masses, gamma=gammas, dtype=dtypes)
def test_selection_reaches_gamma(mass: list[int], gamma: float, dtype: torch.dtype) -> None:
    row = torch.tensor(mass, dtype=dtype)
    assert row[select_cumulative(row, gamma)].sum() >= gamma * sum(mass)


@settings(deadline=None, max_examples=100)
@given(mass=masses, gamma=gammas, dtype=dtypes)
def test_selection_without_its_smallest_entry_misses_gamma(mass: list[int], gamma: float, dtype: torch.dtype) -> None:
    row = torch.tensor(mass, dtype=dtype)
    chosen = row[select_cumulative(row, gamma)]
    assert len(chosen) == 0 or chosen.sum() - chosen.min() < gamma * sum(mass)


@settings(deadline=None, max_examples=100)
@given(mass=masses, gamma=gammas)
def test_no_entry_left_out_is_larger_than_one_chosen(mass: list[int], gamma: float) -> None:
    row = torch.tensor(mass, dtype=torch.float32)
    selected = select_cumulative(row, gamma)
    assert selected.all() or not selected.any() or row[selected].min() >= row[~selected].max()


@settings(deadline=None, max_examples=100)
@given(mass=st.lists(st.integers(0, 2), min_size=1, max_size=60), gamma=gammas)
def test_equal_entries_are_chosen_from_the_left(mass: list[int], gamma: float) -> None:
    selected = select_cumulative(torch.tensor(mass, dtype=torch.float32), gamma).tolist()
    for size in (0, 1, 2):
        chosen = [is_chosen for entry, is_chosen in zip(mass, selected, strict=True) if entry == size]
        assert chosen == sorted(chosen, reverse=True)


@settings(deadline=None, max_examples=50)
@given(mass=masses)
def test_gamma_one_selects_exactly_the_entries_that_are_not_zero(mass: list[int]) -> None:
    row = torch.tensor(mass, dtype=torch.float32)
    assert torch.equal(select_cumulative(row, 1.0), row > 0)


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_zero_mass_selects_nothing(gamma: float) -> None:
    assert not select_cumulative(torch.zeros(7), gamma).any()


@settings(deadline=None, max_examples=30)
@given(rows=st.lists(st.lists(st.integers(0, 50), min_size=6, max_size=6), min_size=2, max_size=6), gamma=gammas)
def test_each_row_is_selected_on_its_own(rows: list[list[int]], gamma: float) -> None:
    mass = torch.tensor(rows, dtype=torch.float32)
    together = select_cumulative(mass.unsqueeze(1), gamma).squeeze(1)
    assert torch.equal(together, torch.stack([select_cumulative(row, gamma) for row in mass]))


@pytest.mark.parametrize("gamma", [0.5, 0.95])
def test_long_row_of_equal_float32_entries_reaches_gamma(gamma: float) -> None:
    length = 1_000_000
    selected = select_cumulative(torch.full((length,), 1e-6), gamma)
    num_selected = int(selected.sum())
    # Rounding of the sums may move the crossing by one entry, never by a share of the row.
    assert abs(num_selected - math.ceil(gamma * length)) <= 1
    assert selected[:num_selected].all()


def test_long_tail_behind_a_large_entry_is_summed_without_loss() -> None:
    # In float32 the running sum moves by 1e-7 or not at all, a hundred entries at once.
    tail, gamma = 1_000_000, 0.9995
    row = torch.full((1 + tail,), 1e-9)
    row[0] = 1
    expected = 1 + math.ceil((gamma * (1 + tail * 1e-9) - 1) / 1e-9)
    assert abs(int(select_cumulative(row, gamma).sum()) - expected) <= 2


def draw_grid(seed: int, num_blocks: int, *, ties: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return a selection, also above the diagonal, scores, both (2, 3, N, N), and the causal grid."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, num_blocks, num_blocks)
    selected = torch.rand(shape, generator=generator) < torch.rand(2, 3, 1, 1, generator=generator)
    score = torch.rand(shape, generator=generator)
    if ties:
        score = (score * 3).floor()
    return selected, score, create_causal_grid(num_blocks, torch.device("cpu"))


def optional_blocks(num_blocks: int) -> Tensor:
    """Return the blocks that budgets count: below the diagonal and right of the sink."""
    grid = torch.ones(num_blocks, num_blocks, dtype=torch.bool).tril(-1)
    grid[:, 0] = False
    return grid


seeds = st.integers(0, 2**32)
sizes = st.integers(1, 12)
budgets = st.integers(0, 13)


@settings(deadline=None, max_examples=50)
@given(seed=seeds, num_blocks=sizes, min_blocks=budgets)
def test_floor_is_reached_in_every_row_that_has_the_blocks(seed: int, num_blocks: int, min_blocks: int) -> None:
    kept = apply_budget(*draw_grid(seed, num_blocks), min_blocks, None)
    available = optional_blocks(num_blocks).sum(-1)
    assert ((kept & optional_blocks(num_blocks)).sum(-1) >= available.clamp(max=min_blocks)).all()


@settings(deadline=None, max_examples=50)
@given(seed=seeds, num_blocks=sizes, min_blocks=budgets)
def test_floor_drops_nothing_that_was_selected(seed: int, num_blocks: int, min_blocks: int) -> None:
    selected, score, causal = draw_grid(seed, num_blocks)
    assert (apply_budget(selected, score, causal, min_blocks, None) | ~(selected & causal)).all()


@settings(deadline=None, max_examples=50)
@given(seed=seeds, num_blocks=sizes, min_blocks=budgets)
def test_floor_adds_only_the_best_scored_blocks_of_a_row(seed: int, num_blocks: int, min_blocks: int) -> None:
    selected, score, causal = draw_grid(seed, num_blocks, ties=True)
    kept = apply_budget(selected, score, causal, min_blocks, None)
    optional = optional_blocks(num_blocks)
    ranks = score.masked_fill(~optional, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    added = kept & ~selected & optional
    assert (ranks[added] < min_blocks).all()


@settings(deadline=None, max_examples=50)
@given(seed=seeds, num_blocks=sizes, max_blocks=budgets)
def test_ceiling_is_kept_in_every_row(seed: int, num_blocks: int, max_blocks: int) -> None:
    selected, score, causal = draw_grid(seed, num_blocks)
    optional = optional_blocks(num_blocks)
    kept = apply_budget(selected, score, causal, 0, max_blocks) & optional
    assert torch.equal(kept.sum(-1), (selected & optional).sum(-1).clamp(max=max_blocks))


@settings(deadline=None, max_examples=50)
@given(seed=seeds, num_blocks=sizes, max_blocks=budgets)
def test_ceiling_drops_the_lowest_scores_and_adds_none(seed: int, num_blocks: int, max_blocks: int) -> None:
    selected, score, causal = draw_grid(seed, num_blocks, ties=True)
    selected &= optional_blocks(num_blocks)
    kept = apply_budget(selected, score, causal, 0, max_blocks) & optional_blocks(num_blocks)
    assert (selected | ~kept).all()
    lowest_kept = score.masked_fill(~kept, torch.inf).amin(-1)
    highest_dropped = score.masked_fill(~selected | kept, -torch.inf).amax(-1)
    assert (lowest_kept >= highest_dropped).all()


@pytest.mark.parametrize(("min_blocks", "max_blocks"), [(2, None), (0, 2)])
def test_budgets_break_ties_from_the_left(min_blocks: int, max_blocks: int | None) -> None:
    causal = create_causal_grid(8, torch.device("cpu"))
    selected = causal.expand(1, 1, 8, 8) & (max_blocks is not None)
    kept = apply_budget(selected, torch.ones(1, 1, 8, 8), causal, min_blocks, max_blocks)
    assert kept[0, 0, 7].nonzero().flatten().tolist() == [0, 1, 2, 7]


@settings(deadline=None, max_examples=50)
@given(seed=seeds, num_blocks=sizes, min_blocks=budgets, max_blocks=st.none() | budgets)
def test_sink_and_diagonal_are_kept_and_nothing_above_it(
    seed: int, num_blocks: int, min_blocks: int, max_blocks: int | None
) -> None:
    kept = apply_budget(*draw_grid(seed, num_blocks), min_blocks, max_blocks)
    assert kept.diagonal(dim1=-2, dim2=-1).all()
    assert kept[..., 0].all()
    assert not kept.triu(1).any()


@pytest.mark.parametrize(("min_blocks", "max_blocks"), [(3, None), (0, 3), (3, 3)])
def test_sink_and_diagonal_come_on_top_of_both_budgets(min_blocks: int, max_blocks: int | None) -> None:
    causal = create_causal_grid(9, torch.device("cpu"))
    selected = causal.expand(1, 1, 9, 9) & (max_blocks is not None)
    # The sink and the diagonal score best: counted, they would take two of the three places.
    score = torch.arange(81.0).view(1, 1, 9, 9).clone()
    score[..., 0] = 1000
    score.diagonal(dim1=-2, dim2=-1).fill_(1000)
    kept = apply_budget(selected, score, causal, min_blocks, max_blocks)
    assert kept.sum(-1).flatten().tolist() == [1, 2, 3, 4, 5, 5, 5, 5, 5]
