"""Interval arithmetic of any expression, against every pair of tokens: NaN, inf and overflow too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.lifting.mask_graphs import assert_sound, classify, classify_by_pairs, materialise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexprefill_compile.block_masks.layout import AttentionSizes

Term = Callable[..., Tensor]
LEAVES: list[Term] = [
    lambda q, k, bias, rows, number: q,
    lambda q, k, bias, rows, number: k,
    lambda q, k, bias, rows, number: q - k,
    lambda q, k, bias, rows, number: bias[q],
    lambda q, k, bias, rows, number: bias[k],
    lambda q, k, bias, rows, number: rows[k],
    lambda q, k, bias, rows, number: number,
]
NUMBERS: list[Term] = [
    torch.add,
    torch.sub,
    torch.mul,
    torch.minimum,
    torch.maximum,
    lambda x, y: torch.where(x > y, x, y + 1),
    lambda x, y: (x - y).abs(),
    lambda x, y: -x - 2 * y,
    lambda x, y: torch.sub(x, y, alpha=-3),
    lambda x, y: (x - y).clamp(-5, 7),
    lambda x, y: (x - y) * 0.5,
    lambda x, y: (x - y).sigmoid(),
    lambda x, y: (x - y).div(3, rounding_mode="trunc"),
    lambda x, y: (x - y) // 4 + (x + y) % 5,
    lambda x, y: (x - y).to(torch.int8),
    lambda x, y: (x < y).float() - (x == y).long(),
]
COMPARISONS: list[Term] = [torch.lt, torch.le, torch.gt, torch.ge, torch.eq, torch.ne]
LOGIC: list[Term] = [
    torch.logical_and,
    torch.logical_or,
    torch.logical_xor,
    lambda x, y: x & ~y,
    lambda x, y: x | y.logical_not(),
    lambda x, y: torch.where(x, y, ~x),
    lambda x, y: x == y,
]
numbers = st.recursive(
    st.sampled_from(LEAVES), lambda children: st.tuples(st.sampled_from(NUMBERS), children, children), max_leaves=4
)
comparisons = st.tuples(st.sampled_from(COMPARISONS), numbers, numbers)
expressions = st.recursive(
    comparisons, lambda children: st.tuples(st.sampled_from(LOGIC), children, children), max_leaves=4
)
SPECIAL = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -1.0, 3.5, 20.0])
EXTREME = torch.tensor([2**63 - 1, -(2**63), -1, 0, 1, 7, 40])


def evaluate(expression: Any, *leaves: Any) -> Tensor:
    if callable(expression):
        return expression(*leaves)
    op, left, right = expression
    return op(evaluate(left, *leaves), evaluate(right, *leaves))


@settings(deadline=None, max_examples=150)
@given(
    expression=expressions,
    seed=st.integers(0, 2**32),
    block_size=st.sampled_from([2, 5]),
    share=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_any_expression_is_sound_with_nan_inf_and_overflow(
    expression: Any, seed: int, block_size: int, share: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = AttentionSizes(1, 1, 12, 13)

    def draw(common: Tensor, special: Tensor) -> Tensor:
        drawn = special[torch.randint(len(special), (13,), generator=generator)]
        return torch.where(torch.rand(13, generator=generator) < share, drawn, common)

    bias = draw(torch.randn(13, generator=generator).round(decimals=1) * 9, SPECIAL)
    rows = draw(torch.randint(-9, 20, (13,), generator=generator), EXTREME)
    captures = (bias, rows, torch.tensor(3))

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor, bias: Tensor, rows: Tensor, number: Tensor) -> Tensor:
        return evaluate(expression, q, k, bias, rows, number)

    bounds = classify(mask, captures, sizes, block_size)
    assert_sound(bounds, classify_by_pairs(materialise(mask, captures, sizes), block_size))


@pytest.mark.parametrize(
    "term",
    [
        lambda q, k, x, n: (x[q] - x[k]).log() <= torch.inf,  # an op without a rule
        lambda q, k, x, n: x[q] - x[k] >= -torch.inf,  # inf - inf
        lambda q, k, x, n: (x[q] * (q - k)).abs() <= torch.inf,  # inf * 0, with zero between the ends
        lambda q, k, x, n: (x[q] - x[k]).minimum(q * 1.0) <= 10,
        lambda q, k, x, n: n[k] - q > 2**63 - 5,  # only what wraps around can be
        lambda q, k, x, n: -(n[k] - k) + 0 * q < 0,
        lambda q, k, x, n: n[k] * (q - k) != -(2**63),
        lambda q, k, x, n: (n[k] + q).to(torch.int32) == 3,
    ],
)
def test_what_lies_between_the_ends_is_not_forgotten(term: Term) -> None:
    captures = (torch.tensor([1.0, torch.inf, -3.0, -torch.inf] * 4), torch.full((16,), -(2**63)))
    sizes = AttentionSizes(1, 1, 16, 16)

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor, x: Tensor, n: Tensor) -> Tensor:
        return term(q, k, x, n)

    bounds = classify(mask, captures, sizes, 8)
    assert_sound(bounds, classify_by_pairs(materialise(mask, captures, sizes), 8))


@pytest.mark.parametrize("compare", COMPARISONS)
def test_nan_makes_a_block_partial(compare: Term) -> None:
    bias = torch.full((16,), torch.nan)

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
        return compare(q * 1.0, bias[k])

    bounds = classify(mask, (bias,), AttentionSizes(1, 1, 16, 16), 8)
    # Equality sees single values, and knows that NaN equals none.
    is_equality = compare in (torch.eq, torch.ne)
    assert bounds.possible.all() == (compare is not torch.eq)
    assert bounds.certain.any() == (is_equality and compare is torch.ne)
