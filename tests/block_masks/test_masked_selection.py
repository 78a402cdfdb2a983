"""Under a mask, pads and other sequences never count; heads keep to their own masks, and to NaN."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import masks
from helpers.inputs import paper_config, random_qk, structured_qk
from helpers.masks import BLOCK, RULE, SCALE, configs, draw_qk, seeds, select
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexprefill_compile.block_masks.estimators.flexprefill.masked_representative import (
    ScoreRule,
)
from flexprefill_compile.block_masks.layout import AttentionSizes
from flexprefill_compile.block_masks.masked_prefill import select_masked_prefill_blocks
from flexprefill_compile.block_masks.masks.facts import describe_mask
from flexprefill_compile.block_masks.masks.intervals import BlockBounds
from flexprefill_compile.block_masks.select import select_cumulative
from flexprefill_compile.settings.config import SparsePrefillConfig


@settings(deadline=None, max_examples=30)
@given(seed=seeds, call=masks.calls(), config=configs())
def test_what_does_not_count_does_not_matter(seed: int, call: masks.Call, config: SparsePrefillConfig) -> None:
    mask_mod, sizes, offset, is_packed = call
    query, key = draw_qk(seed, sizes.batch, max(sizes[2:]))
    query, key = query[:, :, : sizes.query_length].clone(), key[:, :, : sizes.key_length].clone()
    facts = masks.find_facts(mask_mod, sizes, BLOCK, offset=offset, is_packed=is_packed)
    expected = select(query, key, facts, config)
    for row, sequences in enumerate(masks.list_sequences(masks.materialise(mask_mod, sizes), offset, is_packed)):
        valid = {token for sequence in sequences for token in sequence}
        for token in set(range(sizes.key_length)) - valid:
            key[row, :, token] = 1e30
            if 0 <= token - offset < sizes.query_length:
                query[row, :, token - offset] = -1e30
    assert torch.equal(select(query, key, facts, config), expected)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, call=masks.calls(), tau=st.sampled_from([0.0, 0.1, 1.0]), max_budget=st.none() | st.just(10**6))
def test_gamma_one_selects_every_possible_block(
    seed: int, call: masks.Call, tau: float, max_budget: int | None
) -> None:
    mask_mod, sizes, offset, is_packed = call
    query, key = draw_qk(seed, sizes.batch, max(sizes[2:]))
    query, key = 50 * query[:, :, : sizes.query_length], key[:, :, : sizes.key_length]
    facts = masks.find_facts(mask_mod, sizes, BLOCK, offset=offset, is_packed=is_packed)
    config = paper_config(gamma=1, tau=tau, min_budget=0, max_budget=max_budget, block_size=BLOCK)
    selected = select(query, key, facts, config)
    needed = facts.possible & (facts.query_counts.any(-1)[:, None, :, None] | (max_budget is None))
    assert torch.equal(selected & needed, needed.expand_as(selected))


def test_the_pooled_estimate_is_capped_as_the_scores_are() -> None:
    query, key = draw_qk(1, 1, 200)
    sizes = AttentionSizes(1, 1, 200, 200)
    facts = masks.find_facts(masks.causal, sizes, BLOCK)
    # Capped, the attention is almost even, and trusted only if the estimate of Algorithm 2 is capped too.
    config = paper_config(gamma=0.6, tau=0.2, min_budget=0, block_size=BLOCK)
    means = [torch.stack([tokens.mean(-2) for tokens in x.split(BLOCK, -2)], -2) for x in (query, key)]
    logits = 0.1 * torch.tanh(means[0] @ means[1].repeat_interleave(2, 1).mT * 4 / 0.1)
    mass = logits.masked_fill(~facts.possible, -torch.inf).softmax(-1)
    expected = select_cumulative(mass.flatten(-2), 0.6).view_as(mass) | facts.required
    for softcap, is_expected in [(0.1, True), (None, False)]:
        selected = select_masked_prefill_blocks(query, key, None, facts, ScoreRule(4.0, softcap), config)
        assert torch.equal(selected, expected) == is_expected


def test_a_bias_makes_every_head_vertical_slash() -> None:
    query, key = draw_qk(2, 1, 200)
    facts = masks.find_facts(masks.causal, AttentionSizes(1, 1, 200, 200), BLOCK)
    rule = ScoreRule(SCALE, None, torch.zeros_like(facts.row_mask, dtype=torch.float32))
    trusting, wary = (paper_config(gamma=0.8, tau=tau, min_budget=0, block_size=BLOCK) for tau in (1.0, 0.0))
    biased = select_masked_prefill_blocks(query, key, None, facts, rule, trusting)
    assert torch.equal(biased, select(query, key, facts, wary))
    assert not torch.equal(biased, select(query, key, facts, trusting))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("position", [3, 100, 190])
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(("poisoned", "heads"), [(0, [3]), (1, [2, 3]), (2, [2, 3])])
def test_heads_that_read_nan_or_inf_get_every_possible_block_and_no_other_head_does(
    poisoned: int, heads: list[int], is_packed: bool, position: int, poison: float
) -> None:
    """Also where nobody looks: dense attention multiplies the value of a pad by zero, and that is NaN."""
    query, key = structured_qk(0, 2, 4, 2, 200, 32, block_size=BLOCK)
    tensors = [query, key, key.clone()]
    sizes = AttentionSizes(2, 1, 200, 200)
    facts = masks.find_facts(masks.padded([0, 20], [200, 180]), sizes, BLOCK, is_packed=is_packed)
    config = paper_config(gamma=0.5, tau=0.1, min_budget=0, block_size=BLOCK)
    expected = select_masked_prefill_blocks(*tensors, facts, RULE, config)
    assert (expected != facts.possible).flatten(2).any(-1).all(), "the scenario: no head needs every block"
    tensors[poisoned][1, -1, position, 5] = poison
    expected[1, heads] = facts.possible[1]
    assert torch.equal(select_masked_prefill_blocks(*tensors, facts, RULE, config), expected)


@pytest.mark.parametrize("biased", [False, True])
def test_head_whose_scores_overflow_gets_every_possible_block(biased: bool) -> None:
    query, key = random_qk(0, 1, 2, 1, 200, 16, dtype=torch.float32)
    # One score is 1e40 times the scale. The means of blocks stay small enough for theirs.
    query[0, 1, -1, 0], key[0, 0, 3, 0] = 1e20, 1e20
    facts = masks.find_facts(masks.causal, AttentionSizes(1, 1, 200, 200), BLOCK)
    rule = ScoreRule(SCALE, None, torch.zeros(facts.row_mask.shape) if biased else None)
    config = paper_config(gamma=0.3, min_budget=0, block_size=BLOCK)
    selected = select_masked_prefill_blocks(query, key, None, facts, rule, config)
    assert torch.equal(selected[0, 1], facts.possible[0, 0])
    assert not torch.equal(selected[0, 0], facts.possible[0, 0])


@settings(deadline=None, max_examples=30)
@given(seed=seeds, lengths=masks.packings(BLOCK), config=configs(), is_packed=st.booleans())
def test_blocks_not_proven_empty_change_nothing(
    seed: int, lengths: list[list[int]], config: SparsePrefillConfig, is_packed: bool
) -> None:
    """Bounds that know no more than causality: what other sequences and padding hold is found out from the tokens."""
    batch, total = len(lengths), sum(lengths[0])
    query, key = draw_qk(seed, batch, total)
    sizes = AttentionSizes(batch, 1, total, total)
    starts = [0 if is_packed or len(row) == 1 else row[0] for row in lengths]
    stops = [total - min(row[-1] - 1, 40) for row in lengths]
    mask = masks.padded(starts, stops, masks.packed(lengths) if is_packed else masks.causal)
    exact = masks.find_facts(mask, sizes, BLOCK, is_packed=is_packed)
    causal = torch.ones_like(exact.possible).tril()
    loose = describe_mask(mask, (), sizes, BlockBounds(torch.zeros_like(causal), causal), 0, is_packed, BLOCK)
    counts = exact.query_counts.any(-1)[:, None, :, None]
    assert torch.equal(select(query, key, loose, config) & counts, select(query, key, exact, config) & counts)


def test_a_mask_without_valid_keys_is_computed_whole() -> None:
    """A query that sees what comes before it, but not itself: what counts in such a mask is not known."""

    def before(batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        return query_index > key_index

    query, key = draw_qk(3, 2, 100)
    facts = masks.find_facts(before, AttentionSizes(1, 1, 100, 100), BLOCK)
    config = paper_config(gamma=0.5, min_budget=0, block_size=BLOCK)
    assert torch.equal(select(query, key, facts, config), facts.possible.expand(2, query.shape[1], -1, -1))


def test_heads_with_masks_of_their_own_keep_to_them() -> None:
    widths = torch.tensor([20, 60, 1000])

    def windows(batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        return (query_index >= key_index) & (query_index - key_index < widths[head])

    query, key = random_qk(0, 2, 3, 3, 200, 32)
    config = paper_config(gamma=0.7, min_budget=32, block_size=BLOCK)
    together = select(query, key, masks.find_facts(windows, AttentionSizes(1, 3, 200, 200), BLOCK), config)
    for head, width in enumerate(widths.tolist()):
        facts = masks.find_facts(masks.window(width), AttentionSizes(1, 1, 200, 200), BLOCK)
        one = slice(head, head + 1)
        assert torch.equal(together[:, one], select(query[:, one], key[:, one], facts, config))
