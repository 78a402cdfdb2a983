"""What every estimator keeps to, and what the scoring ones compute."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import masks
from helpers.inputs import CountOps, RecordSizes, random_qk, structured_qk
from helpers.scores import SCORES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexprefill_compile.block_masks import create_prefill_block_mask
from flexprefill_compile.block_masks.attention_inputs import SCORES_AT_ONCE
from flexprefill_compile.block_masks.estimators.flexprefill.masked_representative import ScoreRule
from flexprefill_compile.block_masks.estimators.inputs import EstimatorInputs
from flexprefill_compile.block_masks.estimators.table import ESTIMATORS
from flexprefill_compile.block_masks.layout import AttentionSizes, count_blocks, create_causal_grid
from flexprefill_compile.block_masks.masked_prefill import select_masked_prefill_blocks
from flexprefill_compile.block_masks.prefill import select_prefill_blocks
from flexprefill_compile.settings.config import SparsePrefillConfig

BLOCK = 32
SCALE = 0.25
BUILT_IN = list(ESTIMATORS)
NEW = [name for name in BUILT_IN if name != "flexprefill"]
LOOKING = [name for name in BUILT_IN if name not in ("streaming", "dense")]
SCORING = {name: row.score for name, row in ESTIMATORS.items() if row.score is not None}
SELECT = torch.ops.flexprefill.select_blocks.default
SELECT_MASKED = torch.ops.flexprefill.select_masked_blocks.default


def make_config(estimator: str, **settings: Any) -> SparsePrefillConfig:
    return SparsePrefillConfig(**({"gamma": 0.8, "min_budget": 0, "block_size": BLOCK} | settings), estimator=estimator)


def make_inputs(query: Tensor, key: Tensor, block_size: int = BLOCK) -> EstimatorInputs:
    grid = create_causal_grid(count_blocks(query.shape[2], block_size), query.device)
    return EstimatorInputs(query, key, SCALE, block_size, grid[None, None])


def make_structured(batch: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return structured_qk(seed, batch, 4, 2, length, 16, block_size=BLOCK, dtype=torch.float32)


@settings(deadline=None, max_examples=40)
@given(
    estimator=st.sampled_from(BUILT_IN),
    seed=st.integers(0, 2**32),
    batch=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    length=st.integers(1, 300),
    gamma=st.floats(0.1, 0.99),
    block_size=st.sampled_from([16, 64]),
    min_budget=st.sampled_from([0, 100]),
    max_budget=st.sampled_from([None, 128]),
    dense_last=st.sampled_from([0, 1, 90]),
)
def test_tables_are_sound(
    estimator: str, seed: int, batch: int, heads: tuple[int, int], length: int, block_size: int, **settings: Any
) -> None:
    query, key = random_qk(seed, batch, *heads, length, 8, spread=3, dtype=torch.float32)
    config = make_config(estimator, block_size=block_size, **settings)
    tables = create_prefill_block_mask(query, key, config)
    num_blocks = count_blocks(length, block_size)
    grid = torch.zeros(batch, heads[0], num_blocks, num_blocks, dtype=torch.int32)
    for counts, indices in [
        (tables.kv_num_blocks, tables.kv_indices),
        (tables.full_kv_num_blocks, tables.full_kv_indices),
    ]:
        assert counts is not None
        assert indices is not None
        assert ((indices >= 0) & (indices < num_blocks)).all()
        is_used = torch.arange(indices.shape[-1]) < counts.unsqueeze(-1)
        assert (is_used.sum(-1) == counts).all()
        grid.scatter_add_(-1, indices.long(), is_used.int())
    assert grid.max() == 1, "an index twice"
    selected = grid.bool()
    assert not selected.triu(1).any()
    assert selected.diagonal(dim1=-2, dim2=-1).all()
    assert selected[..., 0].all()
    optional = selected.sum(-1) - torch.arange(1, num_blocks + 1).clamp(max=2)
    available = torch.arange(num_blocks).sub(1).clamp(min=0)
    ceiling = available if config.max_budget is None else available.clamp(max=config.max_budget // block_size)
    assert (optional >= available.clamp(max=count_blocks(config.min_budget, block_size)).minimum(ceiling)).all()
    assert (optional <= ceiling).all()
    if config.dense_last:
        last = slice(max(0, length - config.dense_last) // block_size, None)
        assert (optional[..., last] == ceiling[last]).all()
    alone = select_prefill_blocks(query[-1:], key[-1:], None, 8**-0.5, config)
    # Matrix products of other shapes add in another order.
    assert (alone != selected[-1:]).sum() <= 0.02 * selected[-1:].sum(), "another row of the batch had a say"


@pytest.mark.parametrize("estimator", BUILT_IN)
def test_gamma_1_is_every_block_even_those_of_no_mass(estimator: str) -> None:
    query, key = make_structured(1, 333)
    selected = select_prefill_blocks(1000 * query, key, None, 1.0, make_config(estimator, gamma=1))
    assert torch.equal(selected, torch.ones_like(selected).tril())
    capped = select_prefill_blocks(1000 * query, key, None, 1.0, make_config(estimator, gamma=1, max_budget=10**6))
    assert torch.equal(capped, selected)


@pytest.mark.parametrize("estimator", BUILT_IN)
def test_each_head_has_its_own_gamma(estimator: str) -> None:
    query, key = make_structured(2, 600)
    gammas = (0.3, 1.0, 0.9, 0.6)
    together = select_prefill_blocks(query, key, None, SCALE, make_config(estimator, gamma=gammas))
    for head, gamma in enumerate(gammas):
        one = select_prefill_blocks(query, key, None, SCALE, make_config(estimator, gamma=gamma))
        assert torch.equal(together[:, head], one[:, head])


@pytest.mark.parametrize("estimator", SCORING)
@pytest.mark.parametrize("gamma", [0.5, 0.95])
def test_rows_reach_gamma_on_the_estimators_own_scores(estimator: str, gamma: float) -> None:
    query, key = make_structured(2, 777)
    score = SCORING[estimator](make_inputs(query, key))
    torch.testing.assert_close(score.sum(-1), torch.ones_like(score[..., 0]))
    selected = select_prefill_blocks(query, key, None, SCALE, make_config(estimator, gamma=gamma))
    assert ((score * selected).sum(-1) >= gamma - 1e-6).all()
    assert selected.sum() < 0.9 * torch.ones_like(selected).tril().sum(), "the scenario: not every block is needed"


@pytest.mark.parametrize("estimator", SCORES)
@pytest.mark.parametrize(("length", "block_size"), [(5, 16), (70, 16), (96, 32), (131, 32)])
def test_scores_are_those_of_the_definition(estimator: str, length: int, block_size: int) -> None:
    query, key = random_qk(length, 1, 4, 2, length, 8, spread=2)
    actual = SCORING[estimator](make_inputs(query, key, block_size))
    for head in range(4):
        expected = SCORES[estimator](query[0, head], key[0, head // 2], SCALE, block_size, 0, length)
        torch.testing.assert_close(actual[0, head], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimator", SCORES)
def test_scores_made_a_block_at_a_time_are_the_same(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = random_qk(0, 2, 4, 2, 333, 8, spread=2)
    whole = SCORING[estimator](make_inputs(query, key))
    monkeypatch.setitem(SCORES_AT_ONCE, "cpu", 1)
    torch.testing.assert_close(SCORING[estimator](make_inputs(query, key)), whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimator", SCORES)
def test_products_in_bfloat16_as_on_a_gpu_are_near(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = (x.bfloat16() for x in random_qk(0, 1, 4, 2, 333, 16, spread=2))
    exact = SCORING[estimator](make_inputs(query.double(), key.double()))
    monkeypatch.setattr(EstimatorInputs, "product_dtype", torch.bfloat16)
    actual = SCORING[estimator](make_inputs(query, key))
    assert actual.dtype == torch.float32
    # Scores here reach about 20, which bfloat16 holds to 1/16.
    torch.testing.assert_close(actual.double(), exact, rtol=0.15, atol=2e-3)


def test_streaming_is_a_sink_and_a_window() -> None:
    query, key = make_structured(1, 20 * BLOCK)
    selected = select_prefill_blocks(query, key, None, SCALE, make_config("streaming", min_budget=3 * BLOCK))
    distance = torch.arange(20)[:, None] - torch.arange(20)
    expected = ((distance >= 0) & (distance <= 3)) | ((distance >= 0) & (torch.arange(20) == 0))
    assert torch.equal(selected, expected.expand_as(selected))


@pytest.mark.parametrize("estimator", NEW)
@pytest.mark.parametrize("poisoned", [0, 1, 2])
@pytest.mark.parametrize("poison", [math.nan, -math.inf])
def test_heads_that_are_not_finite_compute_every_block(estimator: str, poisoned: int, poison: float) -> None:
    tensors = [*make_structured(2, 300), torch.randn(2, 2, 300, 16)]
    config = make_config(estimator, gamma=0.5)
    expected = select_prefill_blocks(*tensors, SCALE, config).clone()
    tensors[poisoned][1, -1, 70, 5] = poison
    expected[1, [3] if poisoned == 0 else [2, 3]] = create_causal_grid(10, expected.device)
    assert torch.equal(select_prefill_blocks(*tensors, SCALE, config), expected)


@pytest.mark.parametrize("estimator", NEW)
def test_ops_pass_opcheck(estimator: str) -> None:
    query, key = random_qk(0, 2, 4, 2, 77, 8, dtype=torch.float32)
    selection = make_config(estimator, gamma=(0.5, 0.9, 1.0, 0.7), block_size=16, dense_last=20).selection
    torch.library.opcheck(SELECT, (query, key, key, 0.3, *selection))
    facts = masks.find_facts(masks.padded([0, 16], [70, 77]), AttentionSizes(2, 1, 77, 77), 16)
    torch.library.opcheck(SELECT_MASKED, (query, key, key, *facts, None, 0.3, 5.0, *selection))


@pytest.mark.parametrize("estimator", LOOKING)
def test_no_host_sync_and_no_loop_over_heads_or_prompts(estimator: str) -> None:
    counts = []
    for batch, heads, kv_heads in [(2, 4, 2), (5, 8, 4)]:
        query, key = random_qk(0, batch, heads, kv_heads, 200, 16, dtype=torch.float32)
        config = make_config(estimator, gamma=tuple(0.5 + 0.05 * h for h in range(heads)), min_budget=32, dense_last=32)
        sizes = AttentionSizes(batch, 1, 200, 200)
        facts = masks.find_facts(masks.packed([[60, 140]] * batch), sizes, BLOCK, is_packed=True)
        select_prefill_blocks(query, key, key, SCALE, config)  # from now on the gammas are held
        with CountOps() as ops:
            select_prefill_blocks(query, key, key, SCALE, config)
            select_masked_prefill_blocks(query, key, key, facts, ScoreRule(SCALE), config)
        counts.append(ops.counts)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("estimator", SCORING)
def test_memory_stays_within_a_chunk_of_scores(estimator: str) -> None:
    query, key = random_qk(0, 1, 4, 2, 4096, 32, dtype=torch.bfloat16)
    with RecordSizes() as sizes:
        select_prefill_blocks(query, key, key, SCALE, make_config(estimator, block_size=128))
    assert query.shape[1] * 4096 * 4096 // 16 > SCORES_AT_ONCE["cpu"], "the scenario: the scores don't fit at once"
    assert sizes.largest <= SCORES_AT_ONCE["cpu"]
