"""The pooled estimator against its definition, in float64 and one query at a time; and under masks."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.inputs import RecordSizes, random_qk
from torch import Tensor

from flexprefill_compile.block_masks.estimators.inputs import EstimatorInputs
from flexprefill_compile.block_masks.estimators.pooled import score_pooled
from flexprefill_compile.block_masks.layout import count_blocks, create_causal_grid
from flexprefill_compile.block_masks.prefill import select_prefill_blocks
from flexprefill_compile.settings.config import SparsePrefillConfig


def score(query: Tensor, key: Tensor, block_size: int) -> Tensor:
    grid = create_causal_grid(count_blocks(query.shape[2], block_size), query.device)
    return score_pooled(EstimatorInputs(query, key, query.shape[-1] ** -0.5, block_size, grid[None, None]))


def score_by_definition(query: Tensor, key: Tensor, block_size: int) -> Tensor:
    """Take one query of each 8, over the means of 32 keys, each of the weight of its keys."""
    length, pool = len(query), min(32, block_size)
    pools = [key[start : start + pool].double() for start in range(0, length, pool)]
    means, sizes = torch.stack([keys.mean(0) for keys in pools]), torch.tensor([len(keys) for keys in pools])
    num_blocks = math.ceil(length / block_size)
    scores = torch.zeros(num_blocks, num_blocks, dtype=torch.float64)
    weights = torch.zeros(num_blocks, dtype=torch.float64)
    for start in range(0, length, 8):
        number = min(8, length - start)
        position = min(start + number // 2, length - 1)
        seen = torch.arange(len(means)) <= position // pool
        logits = means @ query[position].double() / math.sqrt(query.shape[-1]) + (sizes / pool).log()
        share = logits.masked_fill(~seen, -torch.inf).softmax(0)
        block = start // block_size
        scores[block].index_add_(0, torch.arange(len(means)) * pool // block_size, share * number)
        weights[block] += number
    return scores / weights.unsqueeze(-1)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 512])
@pytest.mark.parametrize("length", [1, 96, 333])
def test_scores_are_those_of_the_definition(length: int, block_size: int) -> None:
    query, key = random_qk(0, 2, 4, 2, length, 24, spread=2, dtype=torch.float64)
    actual = score(query, key, block_size)
    assert actual.shape == (2, 4, count_blocks(length, block_size), count_blocks(length, block_size))
    for batch in range(2):
        for head in range(4):
            expected = score_by_definition(query[batch, head], key[batch, head // 2], block_size)
            torch.testing.assert_close(
                actual[batch, head], expected, rtol=1e-6, atol=1e-8
            )  # weights of means are float32


def test_rows_sum_to_one() -> None:
    query, key = random_qk(0, 1, 2, 1, 500, 32, spread=3)
    sums = score(query, key, 64).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_no_tensor_has_the_size_of_the_scores() -> None:
    query, key = random_qk(0, 1, 2, 1, 4096, 16)
    with RecordSizes() as sizes:
        score(query, key, 64)
    assert sizes.largest < 4096 * 4096 / 4


def test_it_is_the_default_and_has_defaults_of_its_own() -> None:
    config = SparsePrefillConfig()
    assert (config.estimator, config.gammas, config.min_budget) == ("pooled", [0.8], None)
    assert [config.floor_at(length) for length in (100, 8192, 14336, 16384, 2**20)] == [768, 768, 896, 1024, 1024]
    paper = SparsePrefillConfig(estimator="flexprefill")
    assert (paper.gammas, paper.tau, paper.floor_at(2**20), paper.block_size) == ([0.95], 0.1, 1024, 128)


def test_gamma_is_reached_in_each_row_by_what_is_selected() -> None:
    query, key = random_qk(0, 1, 2, 1, 600, 16, spread=2)
    config = SparsePrefillConfig(gamma=0.7, min_budget=0, block_size=32)
    selected = select_prefill_blocks(query, key, None, 0.25, config)
    scores = score(query, key, 32)
    assert ((scores * selected).sum(-1) >= 0.7 - 1e-6).all()
