"""Selection under a mask: pads and other sequences never count, and a prompt selects what it selects alone."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from helpers import masks
from helpers.inputs import qk_of_scores, random_qk, structured_qk
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexprefill_compile.block_masks.attention_inputs import SCORES_AT_ONCE
from flexprefill_compile.block_masks.estimators.flexprefill.masked_representative import (
    ScoreRule,
    compute_masked_attention,
)
from flexprefill_compile.block_masks.estimators.flexprefill.masked_selection import list_segments
from flexprefill_compile.block_masks.estimators.flexprefill.patterns import is_masked_query_aware
from flexprefill_compile.block_masks.estimators.flexprefill.query_aware import select_masked_query_aware
from flexprefill_compile.block_masks.estimators.flexprefill.reference import select_head
from flexprefill_compile.block_masks.layout import AttentionSizes, count_blocks
from flexprefill_compile.block_masks.masked_prefill import select_masked_prefill_blocks
from flexprefill_compile.block_masks.masks.facts import MaskFacts, describe_mask, representative_indices
from flexprefill_compile.block_masks.masks.intervals import BlockBounds
from flexprefill_compile.block_masks.prefill import select_prefill_blocks
from flexprefill_compile.block_masks.segments import Segments
from flexprefill_compile.block_masks.select import select_cumulative
from flexprefill_compile.settings.config import SparsePrefillConfig

BLOCK = 16
SCALE = 0.2
RULE = ScoreRule(SCALE)


@st.composite
def configs(draw: st.DrawFn, taus: tuple[float, ...] = (0.0, 0.1, 1.0)) -> SparsePrefillConfig:
    min_budget = draw(st.sampled_from([0, 0, 32, 60]))
    return SparsePrefillConfig(
        gamma=draw(st.floats(0.51, 0.99)),
        tau=draw(st.sampled_from(taus)),
        min_budget=min_budget,
        max_budget=draw(st.none() | st.integers(max(1, min_budget), 120)),
        block_size=BLOCK,
    )


def draw_qk(seed: int, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Return structured or random inputs, grouped or not; seeds take turns."""
    heads, kv_heads = [(5, 1), (4, 2), (3, 3)][seed % 3]
    if seed % 2:
        return random_qk(seed, batch, heads, kv_heads, length, 32, spread=2)
    query, key = structured_qk(seed, batch, heads, kv_heads, length, 32, block_size=BLOCK)
    query[:, ::2] *= 0.1  # query-aware
    return query, key


def select(query: Tensor, key: Tensor, facts: MaskFacts, config: SparsePrefillConfig) -> Tensor:
    return select_masked_prefill_blocks(query, key, None, facts, RULE, config)


def select_alone(query: Tensor, key: Tensor, config: SparsePrefillConfig) -> Tensor:
    """Return what the oracle selects of prompts that nothing else stands beside, (B, H, N, N)."""
    batch, heads = query.shape[:2]
    group = heads // key.shape[1]
    blocks = [
        select_head(query[b, h], key[b, h // group], SCALE, config).blocks for b in range(batch) for h in range(heads)
    ]
    return torch.stack(blocks).unflatten(0, (batch, heads))


def assert_selects_as_alone(
    selected: Tensor, query: Tensor, key: Tensor, start: int, stop: int, config: SparsePrefillConfig
) -> None:
    """Compare the rows of the tokens from ``start``, where a block begins, to ``stop``, and all their columns."""
    expected = torch.zeros_like(selected)
    rows = slice(start // BLOCK, count_blocks(stop, BLOCK))
    prompt = query[..., start:stop, :], key[..., start:stop, :]
    expected[..., rows, rows] = select_alone(*prompt, config)
    assert torch.equal(selected[..., rows, :], expected[..., rows, :])
    assert torch.equal(expected[..., rows, rows], select_prefill_blocks(*prompt, None, SCALE, config))


seeds = st.integers(0, 2**32)
lengths = st.lists(st.integers(1, 170), min_size=1, max_size=3)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, lengths=lengths, padding=st.integers(0, 40), config=configs(), is_packed=st.booleans())
def test_right_padded_prompts_select_what_they_select_alone(
    seed: int, lengths: list[int], padding: int, config: SparsePrefillConfig, is_packed: bool
) -> None:
    batch, length = len(lengths), max(lengths) + padding
    query, key = draw_qk(seed, batch, length)
    sizes = AttentionSizes(batch, 1, length, length)
    facts = masks.find_facts(masks.padded([0] * batch, lengths), sizes, BLOCK, is_packed=is_packed)
    selected = select(query, key, facts, config)
    for row, stop in enumerate(lengths):
        one = slice(row, row + 1)
        assert_selects_as_alone(selected[one], query[one], key[one], 0, stop, config)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, lengths=lengths, config=configs(), is_packed=st.booleans())
def test_prompts_left_padded_by_whole_blocks_select_what_they_select_alone(
    seed: int, lengths: list[int], config: SparsePrefillConfig, is_packed: bool
) -> None:
    batch, longest = len(lengths), max(lengths)
    lengths = [longest - (longest - length) // BLOCK * BLOCK for length in lengths]
    query, key = draw_qk(seed, batch, longest)
    starts = [longest - length for length in lengths]
    sizes = AttentionSizes(batch, 1, longest, longest)
    facts = masks.find_facts(masks.padded(starts, [longest] * batch), sizes, BLOCK, is_packed=is_packed)
    selected = select(query, key, facts, config)
    for row, start in enumerate(starts):
        one = slice(row, row + 1)
        assert_selects_as_alone(selected[one], query[one], key[one], start, longest, config)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, lengths=masks.packings(BLOCK), config=configs())
def test_prompts_packed_at_whole_blocks_select_what_they_select_alone(
    seed: int, lengths: list[list[int]], config: SparsePrefillConfig
) -> None:
    batch, total = len(lengths), sum(lengths[0])
    query, key = draw_qk(seed, batch, total)
    sizes = AttentionSizes(batch, 1, total, total)
    facts = masks.find_facts(masks.packed(lengths), sizes, BLOCK, is_packed=True)
    selected = select(query, key, facts, config)
    for row, of_row in enumerate(lengths):
        one, start = slice(row, row + 1), 0
        for length in of_row:
            assert_selects_as_alone(selected[one], query[one], key[one], start, start + length, config)
            start += length


@settings(deadline=None, max_examples=30)
@given(
    seed=seeds,
    earlier=st.integers(0, 8),
    length=st.integers(1, 80),
    config=configs((0.0,)),
    as_tensor=st.booleans(),
    unused=st.integers(0, 40),
)
def test_last_chunk_selects_the_rows_of_the_whole_prompt(
    seed: int, earlier: int, length: int, config: SparsePrefillConfig, as_tensor: bool, unused: int
) -> None:
    """A vertical-slash head's rows depend on the representative queries only; a cache may be longer than the prompt."""
    offset = earlier * BLOCK
    total = offset + max(length, BLOCK)  # the representative queries are all in the chunk
    query, key = draw_qk(seed, 2, total)
    expected = select_prefill_blocks(query, key, None, SCALE, config)[:, :, earlier:]
    cache = torch.nn.functional.pad(key, (0, 0, 0, unused), value=3.0)
    sizes = AttentionSizes(1, 1, total - offset, total + unused)
    given_offset = torch.tensor(offset) if as_tensor else offset
    facts = masks.find_facts(masks.chunk(offset), sizes, BLOCK, offset=given_offset)
    selected = select(query[:, :, offset:], cache, facts, config)
    assert torch.equal(selected[..., : expected.shape[-1]], expected)
    assert not selected[..., expected.shape[-1] :].any()


def true_weights(query: Tensor, key: Tensor, mask: Tensor, softcap: float | None = None, slope: float = 0) -> Tensor:
    """Return dense masked attention, (B, H, Q, K), zero for rows that see nothing."""
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * SCALE
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + slope * torch.arange(key.shape[-2])
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0)


def list_representatives(sequence: list[int], sizes: AttentionSizes, offset: int) -> list[int]:
    return masks.list_representatives(sequence, sizes.query_length, offset, BLOCK)


@settings(deadline=None, max_examples=60)
@given(seed=seeds, call=masks.calls(), gamma=st.floats(0.3, 0.99))
def test_representative_queries_of_each_sequence_reach_gamma_on_their_own_tokens(
    seed: int, call: masks.Call, gamma: float
) -> None:
    mask_mod, sizes, offset, is_packed = call
    query, key = draw_qk(seed, sizes.batch, max(sizes[2:]))
    query, key = query[:, :, : sizes.query_length], key[:, :, : sizes.key_length]
    mask = masks.materialise(mask_mod, sizes)
    facts = masks.find_facts(mask_mod, sizes, BLOCK, offset=offset, is_packed=is_packed)
    config = SparsePrefillConfig(gamma=gamma, tau=0, min_budget=0, block_size=BLOCK)
    selected = select(query, key, facts, config)
    assert not (selected & ~facts.possible).any()
    kept = true_weights(query, key, mask) * masks.expand_blocks(selected, sizes, BLOCK)
    for row, sequences in enumerate(masks.list_sequences(mask, offset, is_packed)):
        for sequence in sequences:
            if representatives := list_representatives(sequence, sizes, offset):
                share = kept[row][:, representatives].sum((-2, -1)) / len(representatives)
                assert (share >= gamma - 1e-9).all()


@settings(deadline=None, max_examples=60)
@given(
    seed=seeds,
    call=masks.calls(),
    softcap=st.none() | st.floats(0.5, 20),
    slope=st.just(0.0) | st.floats(0, 0.1),
    at_once=st.sampled_from([1, 2**20]),
)
def test_columns_and_diagonals_are_those_of_each_pair_of_tokens(
    seed: int,
    call: masks.Call,
    softcap: float | None,
    slope: float,
    at_once: int,
) -> None:
    mask_mod, sizes, offset, is_packed = call
    query, key = draw_qk(seed, sizes.batch, max(sizes[2:]))
    query, key = query[:, :, : sizes.query_length], key[:, :, : sizes.key_length]
    facts = masks.find_facts(mask_mod, sizes, BLOCK, offset=offset, is_packed=is_packed)
    key_index = representative_indices(facts.rows, 1, 1, sizes.key_length)[-1]
    rule = ScoreRule(SCALE, softcap, (slope * key_index).expand(1, 1, *facts.row_mask.shape[2:]) if slope else None)
    with mock.patch.dict(SCORES_AT_ONCE, cpu=at_once):
        pooled = compute_masked_attention(query, key, facts, rule, list_segments(facts), torch.float64).pooled
    has_segments = facts.rows.shape[1] > 1

    columns, diagonals = torch.zeros_like(pooled.columns), torch.zeros_like(pooled.diagonals)
    mask = masks.materialise(mask_mod, sizes)
    for row, sequences in enumerate(masks.list_sequences(mask, offset, is_packed)):
        for sequence, counted in zip(sequences, masks.count_tokens(sequences, BLOCK), strict=True):
            rows = list_representatives(sequence, sizes, offset)
            if not counted or not rows:
                continue
            one, own_mask = slice(row, row + 1), torch.zeros_like(mask[row : row + 1])
            own_mask[..., counted] = mask[one][..., counted]
            weights = true_weights(query[one], key[one], own_mask, softcap, slope)[0][:, rows]
            weights = weights / weights.sum((-2, -1), keepdim=True)
            # Query blocks begin at multiples of the block before or after the offset: as if there were more keys.
            shift = -offset % BLOCK
            first, last = counted[0] // BLOCK, (rows[-1] + offset + shift) // BLOCK
            last = min(last, counted[-1] // BLOCK) if has_segments else last
            for index, query_row in enumerate(rows):
                for k in counted:
                    weight = weights[:, index, k]
                    columns[row, :, k // BLOCK] += weight
                    diagonal, remainder = divmod(query_row + offset + shift - k, BLOCK)
                    for d, share in [(diagonal, BLOCK - remainder), (diagonal + 1, remainder)]:
                        diagonals[row, :, min(first + max(d, 0), last)] += weight * share / BLOCK
    torch.testing.assert_close(pooled.columns, columns)
    torch.testing.assert_close(pooled.diagonals, diagonals)


@pytest.mark.parametrize("offset", [0, 1, 37, 48, 63])
@pytest.mark.parametrize("diagonal", [0, 5, 16, 37, 70])
def test_a_token_diagonal_is_computed_in_every_row_wherever_the_chunk_begins(offset: int, diagonal: int) -> None:
    length = 160
    row, column = torch.arange(length)[:, None], torch.arange(length)
    query, key = qk_of_scores(50.0 * (row - column == diagonal).double().unsqueeze(0))
    sizes = AttentionSizes(1, 1, length - offset, length)
    facts = masks.find_facts(masks.chunk(offset), sizes, BLOCK, offset=offset)
    config = SparsePrefillConfig(gamma=0.99, tau=0, min_budget=0, block_size=BLOCK)
    selected = select_masked_prefill_blocks(query[:, :, offset:], key, None, facts, ScoreRule(1.0), config)
    tokens = masks.expand_blocks(selected, sizes, BLOCK)[0, 0]
    rows = torch.arange(max(0, diagonal - offset), length - offset)
    assert tokens[rows, rows + offset - diagonal].all()
    assert not selected[0, 0, -1].all()


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
    config = SparsePrefillConfig(gamma=1, tau=tau, min_budget=0, max_budget=max_budget, block_size=BLOCK)
    selected = select(query, key, facts, config)
    needed = facts.possible & (facts.query_counts.any(-1)[:, None, :, None] | (max_budget is None))
    assert torch.equal(selected & needed, needed.expand_as(selected))


def test_the_pooled_estimate_is_capped_as_the_scores_are() -> None:
    query, key = draw_qk(1, 1, 200)
    sizes = AttentionSizes(1, 1, 200, 200)
    facts = masks.find_facts(masks.causal, sizes, BLOCK)
    # Capped, the attention is almost even, and trusted only if the estimate of Algorithm 2 is capped too.
    config = SparsePrefillConfig(gamma=0.6, tau=0.2, min_budget=0, block_size=BLOCK)
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
    trusting, wary = (SparsePrefillConfig(gamma=0.8, tau=tau, min_budget=0, block_size=BLOCK) for tau in (1.0, 0.0))
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
    config = SparsePrefillConfig(gamma=0.5, tau=0.1, min_budget=0, block_size=BLOCK)
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
    config = SparsePrefillConfig(gamma=0.3, min_budget=0, block_size=BLOCK)
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
    config = SparsePrefillConfig(gamma=0.5, min_budget=0, block_size=BLOCK)
    assert torch.equal(select(query, key, facts, config), facts.possible.expand(2, query.shape[1], -1, -1))


def test_heads_with_masks_of_their_own_keep_to_them() -> None:
    widths = torch.tensor([20, 60, 1000])

    def windows(batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        return (query_index >= key_index) & (query_index - key_index < widths[head])

    query, key = random_qk(0, 2, 3, 3, 200, 32)
    config = SparsePrefillConfig(gamma=0.7, min_budget=32, block_size=BLOCK)
    together = select(query, key, masks.find_facts(windows, AttentionSizes(1, 3, 200, 200), BLOCK), config)
    for head, width in enumerate(widths.tolist()):
        facts = masks.find_facts(masks.window(width), AttentionSizes(1, 1, 200, 200), BLOCK)
        one = slice(head, head + 1)
        assert torch.equal(together[:, one], select(query[:, one], key[:, one], facts, config))


def test_a_pattern_is_judged_by_the_blocks_that_the_representative_queries_see() -> None:
    is_seen = torch.tensor([[[False, True, True, True]]])
    logits = torch.tensor([[[9.0, 1.0, 2.0, 3.0]]])
    columns = torch.nn.functional.pad(logits[..., 1:].softmax(-1), (1, 0))
    assert is_masked_query_aware(logits, is_seen, columns, 0.01, None).all()
    assert not is_masked_query_aware(logits, torch.ones_like(is_seen), columns, 0.01, None).any()


def test_one_packed_sequence_is_estimated_as_one_prompt() -> None:
    """Where every block is possible, so that no zeros stand at the end of the sorted estimate."""
    logits, segments = (
        torch.randn(2, 3, 6, 6, dtype=torch.float64),
        Segments(torch.zeros(6).long(), torch.full((6,), 5)),
    )
    candidates = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    for gamma in (0.3, 0.7, 0.999):
        packed, _ = select_masked_query_aware(logits.clone(), candidates, gamma, segments)
        alone, _ = select_masked_query_aware(logits.clone(), candidates, gamma, None)
        assert torch.equal(packed, alone)
