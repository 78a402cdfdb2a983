"""Under a mask: the attention of each sequence's representative queries, and what follows from it."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from helpers import masks
from helpers.inputs import paper_config, qk_of_scores
from helpers.masks import BLOCK, SCALE, draw_qk, seeds, select
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
from flexprefill_compile.block_masks.layout import AttentionSizes
from flexprefill_compile.block_masks.masked_prefill import select_masked_prefill_blocks
from flexprefill_compile.block_masks.masks.facts import representative_indices
from flexprefill_compile.block_masks.segments import Segments


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
    config = paper_config(gamma=gamma, tau=0, min_budget=0, block_size=BLOCK)
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
    config = paper_config(gamma=0.99, tau=0, min_budget=0, block_size=BLOCK)
    selected = select_masked_prefill_blocks(query[:, :, offset:], key, None, facts, ScoreRule(1.0), config)
    tokens = masks.expand_blocks(selected, sizes, BLOCK)[0, 0]
    rows = torch.arange(max(0, diagonal - offset), length - offset)
    assert tokens[rows, rows + offset - diagonal].all()
    assert not selected[0, 0, -1].all()


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
