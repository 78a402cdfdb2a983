"""The batched selection against the slow float64 oracle, head by head."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from helpers.inputs import STRUCTURES, paper_config, random_qk, structured_qk
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexprefill_compile.block_masks.attention_inputs import SCORES_AT_ONCE
from flexprefill_compile.block_masks.estimators.flexprefill.patterns import is_query_aware
from flexprefill_compile.block_masks.estimators.flexprefill.reference import HeadSelection, select_head
from flexprefill_compile.block_masks.prefill import select_prefill_blocks
from flexprefill_compile.settings.config import SparsePrefillConfig

QK = tuple[Tensor, Tensor]


def select_with_oracle(query: Tensor, key: Tensor, scale: float, config: SparsePrefillConfig) -> list[HeadSelection]:
    """Return the oracle's choice for each head, prompt by prompt."""
    group = query.shape[1] // key.shape[1]
    return [
        select_head(query[b, h], key[b, h // group], scale, config)
        for b in range(query.shape[0])
        for h in range(query.shape[1])
    ]


def assert_equals_oracle(query: Tensor, key: Tensor, scale: float, config: SparsePrefillConfig) -> set[str]:
    """Compare every head; return the patterns that occurred."""
    expected = select_with_oracle(query, key, scale, config)
    selected = select_prefill_blocks(query, key, None, scale, config)
    assert selected.dtype == torch.bool
    assert torch.equal(selected.flatten(0, 1), torch.stack([head.blocks for head in expected]))
    return {head.pattern for head in expected}


@st.composite
def configs(draw: st.DrawFn) -> SparsePrefillConfig:
    min_budget = draw(st.sampled_from([0, 0, 16, 40, 100]))
    return paper_config(
        # 1 / n is where query-aware ties for want of a reason: block (0, 0) holds exactly 1 of the n rows' mass.
        gamma=draw(st.sampled_from([0.13, 0.37]) | st.floats(0.51, 0.995)),
        tau=draw(st.sampled_from([0.0, 0.1, 1.0])),
        min_budget=min_budget,
        max_budget=draw(st.none() | st.integers(max(1, min_budget), 200)),
        block_size=draw(st.sampled_from([16, 32, 64])),
    )


heads = st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1), (6, 3)])
scores_at_once = st.sampled_from([1, 10_000, 2**20])


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**32),
    batch=st.integers(1, 3),
    num_heads=heads,
    length=st.integers(1, 260),
    head_dim=st.sampled_from([1, 5, 16, 33]),
    spread=st.sampled_from([0.2, 1.0, 3.0]),
    scale=st.none() | st.floats(0.05, 2),
    config=configs(),
    at_once=scores_at_once,
)
def test_random_heads_select_what_the_oracle_selects(
    seed: int,
    batch: int,
    num_heads: tuple[int, int],
    length: int,
    head_dim: int,
    spread: float,
    scale: float | None,
    config: SparsePrefillConfig,
    at_once: int,
) -> None:
    query, key = random_qk(seed, batch, *num_heads, length, head_dim, spread=spread)
    with mock.patch.dict(SCORES_AT_ONCE, cpu=at_once):
        assert_equals_oracle(query, key, head_dim**-0.5 if scale is None else scale, config)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**32),
    batch=st.integers(1, 2),
    num_heads=heads,
    length=st.integers(1, 260),
    head_dim=st.sampled_from([16, 32, 45]),
    strength=st.sampled_from([4.0, 10.0]),
    config=configs(),
    at_once=scores_at_once,
)
def test_structured_heads_select_what_the_oracle_selects(
    seed: int,
    batch: int,
    num_heads: tuple[int, int],
    length: int,
    head_dim: int,
    strength: float,
    config: SparsePrefillConfig,
    at_once: int,
) -> None:
    query, key = structured_qk(
        seed, batch, *num_heads, length, head_dim, block_size=config.block_size, strength=strength
    )
    with mock.patch.dict(SCORES_AT_ONCE, cpu=at_once):
        assert_equals_oracle(query, key, head_dim**-0.5, config)


def test_both_patterns_occur_in_one_call_at_the_papers_tau() -> None:
    config = paper_config(gamma=0.9, tau=0.1, min_budget=0, block_size=16)
    query, key = structured_qk(0, 2, 6, 2, 256, 32, block_size=16)
    query[:, ::2] *= 0.05  # almost even attention, which pooling predicts well
    expected = select_with_oracle(query, key, 32**-0.5, config)
    assert [head.pattern for head in expected] == ["query-aware", "vertical-slash"] * 6
    assert_equals_oracle(query, key, 32**-0.5, config)


@pytest.mark.parametrize(("tau", "pattern"), [(0.0, "vertical-slash"), (1.0, "query-aware")])
@pytest.mark.parametrize(("min_budget", "max_budget"), [(0, None), (50, None), (0, 50)])
@pytest.mark.parametrize("length", [239, 240])
def test_tau_forces_either_pattern_on_every_structure(
    tau: float, pattern: str, min_budget: int, max_budget: int | None, length: int
) -> None:
    config = paper_config(gamma=0.9, tau=tau, min_budget=min_budget, max_budget=max_budget, block_size=16)
    query, key = structured_qk(0, 1, len(STRUCTURES), 1, length, 32, block_size=16)
    assert assert_equals_oracle(query, key, 32**-0.5, config) == {pattern}


def test_tau_zero_trusts_not_even_a_perfect_estimate() -> None:
    pooled_query, pooled_key = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 4, 8)
    columns = torch.full((1, 1, 4), 0.25)
    assert not is_query_aware(pooled_query, pooled_key, columns, 1.0, tau=0).any()
    assert is_query_aware(pooled_query, pooled_key, columns, 1.0, tau=0.01).all()


@pytest.mark.parametrize("make", [random_qk, lambda *sizes: structured_qk(*sizes, block_size=16)])
def test_rows_of_a_batch_are_independent(make: object) -> None:
    assert callable(make)
    query, key = make(3, 3, 5, 1, 251, 32)
    config = paper_config(gamma=0.9, min_budget=32, max_budget=96, block_size=16)
    # Few at once, so that a batch is cut into chunks of other sizes than its rows alone.
    with mock.patch.dict(SCORES_AT_ONCE, cpu=20_000):
        together = select_prefill_blocks(query, key, None, 0.2, config)
        for row in range(3):
            alone = select_prefill_blocks(query[row : row + 1], key[row : row + 1], None, 0.2, config)
            assert torch.equal(together[row : row + 1], alone)


UNIT = 2.0**-24  # a float32 operation is off by this share of its result at most


def bound_mass_error(query: Tensor, key: Tensor, scale: float, block_size: int) -> float:
    """Bound the relative error of a float32 mass, first order in UNIT, for inputs that are taken as exact.

    A score is a dot product of head_dim terms, of factors that are means of block_size tokens in the pooled estimate
    and scaled: off by (head_dim + 2 * block_size + 4) UNIT |q| |k| scale. Less its row's log total, which is at most
    |score| + log(length), it is rounded once more. exp makes that a relative error; the total has the same, and adds
    length UNIT. The sums over queries and keys add as many UNITs as there are terms in a row; the shares, the mean
    and exp and log themselves are within the last 16.
    """
    length, head_dim = query.shape[-2:]
    largest = scale * query.norm(dim=-1).max().item() * key.norm(dim=-1).max().item()
    score = (head_dim + 2 * block_size + 4) * largest + 2 * (2 * largest + math.log(length))
    return (2 * score + length + 3 * block_size + 16) * UNIT


def is_decided(mass: Tensor, gamma: float, error: float) -> bool:
    """Whether no relative ``error`` of the float64 masses changes which are the fewest that reach gamma.

    The k entries chosen stay the k largest if the last of them leads the next by more than both can move, and they
    stay k if the sums before and after the last one miss gamma by more than they and the total can move.
    """
    ordered = mass.flatten().sort(descending=True).values / mass.sum()
    sums = ordered.cumsum(0)
    last = int((sums < gamma).sum())
    before, after = (sums[last - 1].item() if last else 0.0), sums[last].item()
    following = ordered[last + 1].item() if last + 1 < len(ordered) else 0.0
    return (
        min(gamma - before, after - gamma) > 2 * error
        and ordered[last].item() - following > 2 * error * ordered[last].item()
    )


def is_head_decided(
    query: Tensor, key: Tensor, scale: float, config: SparsePrefillConfig, expected: HeadSelection
) -> bool:
    """Whether float32 can't take another pattern or other blocks than the oracle, budgets aside."""
    error = bound_mass_error(query, key, scale, config.block_size)
    num_blocks = len(expected.columns)
    # dH = -(1 + log p) dp, so an entropy moves by error * (H + 1) at most, and H <= log(num_blocks). Its own sum adds
    # num_blocks UNITs. The divergence is one entropy less the mean of two.
    divergence_error = 2 * (error + (num_blocks + 2) * UNIT) * (math.log(num_blocks) + 1)
    if 0 < config.tau < 1 and abs(expected.distance**2 - config.tau**2) <= divergence_error:
        return False
    if expected.pattern == "vertical-slash":
        return is_decided(expected.columns, config.gamma, error) and is_decided(expected.diagonals, config.gamma, error)
    pooled_query, pooled_key = (
        torch.stack([tokens.mean(0) for tokens in x.double().split(config.block_size)]) for x in (query, key)
    )
    future = torch.ones(num_blocks, num_blocks, dtype=torch.bool).triu(1)
    mass = (pooled_query @ pooled_key.T * scale).masked_fill(future, -torch.inf).softmax(-1)
    return is_decided(mass, config.gamma, error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tau", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("length", [192, 201])
@pytest.mark.parametrize("structured", [False, True])
def test_lower_precision_selects_what_the_oracle_selects(
    dtype: torch.dtype, tau: float, length: int, structured: bool
) -> None:
    config = paper_config(gamma=0.9, tau=tau, min_budget=0, block_size=16)
    sizes = (0, 2, 5, 1, length, 32)
    query, key = structured_qk(*sizes, block_size=16, dtype=dtype) if structured else random_qk(*sizes, dtype=dtype)
    selected = select_prefill_blocks(query, key, None, 32**-0.5, config).flatten(0, 1)
    num_decided = 0
    for head, expected in enumerate(select_with_oracle(query, key, 32**-0.5, config)):
        head_query, head_key = query.flatten(0, 1)[head].double(), key[head // 5, 0].double()
        if is_head_decided(head_query, head_key, 32**-0.5, config, expected):
            num_decided += 1
            assert torch.equal(selected[head], expected.blocks)
    assert num_decided >= 0.7 * len(selected)
