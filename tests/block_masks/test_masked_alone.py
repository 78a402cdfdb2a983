"""Under a mask, a prompt selects what it selects alone."""

from __future__ import annotations

import torch
from helpers import masks
from helpers.masks import BLOCK, SCALE, configs, draw_qk, seeds, select
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexprefill_compile.block_masks.estimators.flexprefill.reference import select_head
from flexprefill_compile.block_masks.layout import AttentionSizes, count_blocks
from flexprefill_compile.block_masks.prefill import select_prefill_blocks
from flexprefill_compile.settings.config import SparsePrefillConfig

lengths = st.lists(st.integers(1, 170), min_size=1, max_size=3)


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
