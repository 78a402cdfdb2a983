"""The block grid: pooling, and packing a selection into FlexAttention's tables."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention

from flexprefill_compile.block_masks.layout import (
    BlockTables,
    count_blocks,
    create_causal_grid,
    pack_causal_blocks,
    pool_blocks,
    sum_blocks,
)
from flexprefill_compile.block_masks.prefill import causal_mask, create_block_mask

lengths = st.integers(1, 200)
block_sizes = st.sampled_from([1, 16, 32])


@settings(deadline=None, max_examples=50)
@given(length=lengths, block_size=block_sizes)
def test_pool_blocks_averages_the_tokens_that_a_block_has(length: int, block_size: int) -> None:
    x = torch.randn(2, 3, length, 5, dtype=torch.float64)
    expected = torch.stack([tokens.mean(-2) for tokens in x.split(block_size, dim=-2)], dim=-2)
    torch.testing.assert_close(pool_blocks(x, block_size, torch.float64), expected)


@settings(deadline=None, max_examples=50)
@given(length=lengths, block_size=block_sizes)
def test_sum_blocks_sums_the_tokens_that_a_block_has(length: int, block_size: int) -> None:
    x = torch.randn(2, 3, length, dtype=torch.float64)
    expected = torch.stack([tokens.sum(-1) for tokens in x.split(block_size, dim=-1)], dim=-1)
    torch.testing.assert_close(sum_blocks(x, block_size), expected)


@pytest.mark.parametrize("length", [64, 77])
def test_pooling_reads_strided_input_as_it_reads_a_copy(length: int) -> None:
    strided = torch.randn(2, length, 3, 10)[..., ::2].transpose(1, 2)
    assert not strided.is_contiguous()
    pooled = pool_blocks(strided, 16, torch.float32)
    torch.testing.assert_close(pooled, pool_blocks(strided.contiguous(), 16, torch.float32))
    summed = sum_blocks(strided[..., 0], 16)
    torch.testing.assert_close(summed, sum_blocks(strided[..., 0].contiguous(), 16))


@pytest.mark.parametrize("length", [64, 77])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pool_blocks_averages_in_the_given_dtype(length: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, length, 5).to(dtype)
    torch.testing.assert_close(pool_blocks(x, 16, torch.float32), pool_blocks(x.float(), 16, torch.float32))


@pytest.mark.parametrize(("length", "num_blocks"), [(1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_ragged_block_counts_as_one(length: int, num_blocks: int) -> None:
    assert count_blocks(length, 16) == num_blocks


def draw_selection(seed: int, num_blocks: int) -> Tensor:
    """Return a causal selection of any density with its diagonal, (2, 3, N, N)."""
    generator = torch.Generator().manual_seed(seed)
    density = torch.rand(2, 3, 1, 1, generator=generator)
    selected = torch.rand(2, 3, num_blocks, num_blocks, generator=generator) < density
    return (selected | torch.eye(num_blocks, dtype=torch.bool)) & create_causal_grid(num_blocks, selected.device)


def halves(tables: BlockTables) -> list[tuple[Tensor, Tensor]]:
    """Return counts and indices of the masked and of the full blocks."""
    return [(tables.kv_num_blocks, tables.kv_indices), (tables.full_kv_num_blocks, tables.full_kv_indices)]


selections = st.builds(draw_selection, st.integers(0, 2**32), st.integers(1, 12))


@settings(deadline=None, max_examples=50)
@given(selected=selections)
def test_indices_of_a_row_are_each_block_once(selected: Tensor) -> None:
    every_block = torch.arange(selected.shape[-1], dtype=torch.int32)
    for _, indices in halves(pack_causal_blocks(selected)):
        assert torch.equal(indices.sort(dim=-1).values, every_block.expand_as(indices))


@settings(deadline=None, max_examples=50)
@given(selected=selections)
def test_indices_within_the_count_ascend(selected: Tensor) -> None:
    for counts, indices in halves(pack_causal_blocks(selected)):
        is_used = torch.arange(1, indices.shape[-1]) < counts.unsqueeze(-1)
        assert (indices.diff(dim=-1)[is_used] > 0).all()


@settings(deadline=None, max_examples=50)
@given(selected=selections)
def test_tables_are_contiguous_int32(selected: Tensor) -> None:
    for table in pack_causal_blocks(selected):
        assert table.dtype == torch.int32
        assert table.is_contiguous()


@settings(deadline=None, max_examples=50)
@given(selected=selections)
def test_diagonal_is_masked_and_what_is_below_is_full(selected: Tensor) -> None:
    for (counts, indices), expected in zip(
        halves(pack_causal_blocks(selected)), (selected.triu(), selected.tril(-1)), strict=True
    ):
        is_used = torch.arange(indices.shape[-1]) < counts.unsqueeze(-1)
        listed = torch.zeros_like(selected).scatter_(-1, indices.long(), is_used)
        assert torch.equal(listed, expected)


@settings(deadline=None, max_examples=50)
@given(selected=selections, ragged=st.integers(0, 15))
def test_mask_of_the_tables_holds_the_selection(selected: Tensor, ragged: int) -> None:
    length = selected.shape[-1] * 16 - ragged
    mask = create_block_mask(pack_causal_blocks(selected), length, length, 16)
    assert torch.equal(mask.to_dense().bool(), selected)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("length", [1, 15, 16, 31, 97, 129, 160])
def test_full_and_masked_blocks_of_a_dense_selection_are_those_of_torch(length: int, block_size: int) -> None:
    num_blocks = count_blocks(length, block_size)
    grid = create_causal_grid(num_blocks, torch.device("cpu")).expand(1, 1, -1, -1)
    mask = create_block_mask(pack_causal_blocks(grid), length, length, block_size)
    expected = flex_attention.create_block_mask(causal_mask, 1, 1, length, length, device="cpu", BLOCK_SIZE=block_size)
    assert torch.equal(mask.to_dense(), expected.to_dense())
    # Torch pads queries with False and calls the ragged last row masked; rows that don't exist need no mask.
    num_whole = length // block_size
    assert mask.full_kv_num_blocks is not None
    assert expected.full_kv_num_blocks is not None
    for ours, theirs in [
        (mask.kv_num_blocks, expected.kv_num_blocks),
        (mask.full_kv_num_blocks, expected.full_kv_num_blocks),
    ]:
        assert torch.equal(ours[..., :num_whole], theirs[..., :num_whole])
    for row in range(num_whole):
        num_full = int(mask.full_kv_num_blocks[0, 0, row])
        assert mask.full_kv_indices is not None
        assert expected.full_kv_indices is not None
        assert torch.equal(mask.full_kv_indices[0, 0, row, :num_full], expected.full_kv_indices[0, 0, row, :num_full])
        assert torch.equal(mask.kv_indices[0, 0, row, :1], expected.kv_indices[0, 0, row, :1])


@pytest.mark.parametrize("length", [15, 97, 129])
def test_no_token_pair_of_a_full_block_is_masked(length: int) -> None:
    num_blocks = count_blocks(length, 16)
    tables = pack_causal_blocks(create_causal_grid(num_blocks, torch.device("cpu")).expand(1, 1, -1, -1))
    for row in range(num_blocks):
        for column in tables.full_kv_indices[0, 0, row, : tables.full_kv_num_blocks[0, 0, row]].tolist():
            assert (column + 1) * 16 <= min(row * 16, length)
