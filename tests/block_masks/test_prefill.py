"""``create_prefill_block_mask`` and the ops under it, as a caller sees them."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.inputs import RecordSizes, covered_share, paper_config, random_qk, representative_weights, structured_qk
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexprefill_compile.block_masks import create_prefill_block_mask
from flexprefill_compile.block_masks.attention_inputs import SCORES_AT_ONCE
from flexprefill_compile.block_masks.prefill import select_prefill_blocks

CONFIG = paper_config(gamma=0.8, min_budget=0, block_size=16)


def count_selected(mask: BlockMask) -> int:
    """Return how many blocks a mask computes."""
    return int(mask.to_dense().sum())


@pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(1, 1, 1), (2, 4, 2), (3, 2, 2)])
@pytest.mark.parametrize("length", [1, 100, 128])
def test_mask_has_the_shape_of_the_scores(batch: int, heads: int, kv_heads: int, length: int) -> None:
    mask = create_prefill_block_mask(*random_qk(0, batch, heads, kv_heads, length, 8), CONFIG)
    num_blocks = math.ceil(length / 16)
    assert mask.shape == (batch, heads, length, length)
    assert mask.seq_lengths == (length, length)
    assert mask.to_dense().shape == (batch, heads, num_blocks, num_blocks)


def test_mask_has_no_transposed_tables() -> None:
    mask = create_prefill_block_mask(*random_qk(0, 1, 2, 1, 100, 8), CONFIG)
    assert mask.q_indices is None


def test_mask_is_causal_within_a_block() -> None:
    mask = create_prefill_block_mask(*random_qk(0, 1, 2, 1, 100, 8), CONFIG)
    query_index, key_index = torch.arange(100)[:, None], torch.arange(100)
    visible = mask.mask_mod(torch.tensor(0), torch.tensor(0), query_index, key_index)
    assert torch.equal(visible, torch.ones(100, 100, dtype=torch.bool).tril())


QUERY = torch.zeros(2, 4, 64, 8)
KEY = torch.zeros(2, 2, 64, 8)


@pytest.mark.parametrize(
    ("query", "key", "message"),
    [
        (QUERY[0], KEY, r"must be \(batch, heads, length, head_dim\), got \(4, 64, 8\)"),
        (QUERY, KEY[0], r"must be \(batch, heads, length, head_dim\), got .* and \(2, 64, 8\)"),
        (QUERY, KEY[:1], "same batch, length and head_dim"),
        (QUERY, KEY[:, :, :63], "same batch, length and head_dim"),
        (QUERY, KEY[..., :7], "same batch, length and head_dim"),
        (QUERY[:, :, :0], KEY[:, :, :0], "must not be empty"),
        (QUERY, KEY[:, :0], "must not be empty"),
        (QUERY[:, :3], KEY, "query heads must be a multiple of key heads, got 3 and 2"),
        (QUERY[:, :1], KEY, "query heads must be a multiple of key heads, got 1 and 2"),
        (QUERY.int(), KEY.int(), "one floating point dtype, got torch.int32"),
        (QUERY, KEY.half(), "one floating point dtype, got torch.float32 and torch.float16"),
        (QUERY, KEY.to("meta"), "must be on one device, cpu or cuda, got cpu and meta"),
        (QUERY.to("meta"), KEY.to("meta"), "must be on one device, cpu or cuda, got meta and meta"),
    ],
)
def test_misuse_raises_one_clear_value_error(query: Tensor, key: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_prefill_block_mask(query, key)


@pytest.mark.parametrize("block_size", [16, 64])
def test_block_size_is_honoured(block_size: int) -> None:
    config = paper_config(gamma=0.8, min_budget=0, block_size=block_size)
    mask = create_prefill_block_mask(*random_qk(0, 1, 2, 1, 200, 8), config)
    assert (block_size, block_size) == mask.BLOCK_SIZE
    assert mask.to_dense().shape[-1] == math.ceil(200 / block_size)


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_more_gamma_selects_more(tau: float) -> None:
    query, key = random_qk(0, 1, 2, 1, 300, 8)
    counts = [
        count_selected(
            create_prefill_block_mask(query, key, paper_config(gamma=gamma, tau=tau, min_budget=0, block_size=16))
        )
        for gamma in (0.1, 0.3, 0.6, 1)
    ]
    assert counts == sorted(set(counts))


def test_scale_is_one_over_sqrt_of_head_dim_by_default() -> None:
    query, key = random_qk(0, 1, 4, 2, 300, 24, spread=2)
    by_default = create_prefill_block_mask(query, key, CONFIG).to_dense()
    assert torch.equal(by_default, create_prefill_block_mask(query, key, CONFIG, scale=24**-0.5).to_dense())
    assert not torch.equal(by_default, create_prefill_block_mask(query, key, CONFIG, scale=1.0).to_dense())


def test_the_papers_config_keeps_the_papers_floor() -> None:
    query, key = structured_qk(0, 1, 5, 1, 2048, 32, block_size=128, dtype=torch.float32)
    mask = create_prefill_block_mask(query, key, paper_config())
    num_optional = torch.arange(16).sub(1).clamp(0, 1024 // 128)
    floor = num_optional + torch.arange(1, 17).clamp(max=2)
    assert (mask.to_dense().sum(-1) >= floor).all()


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**32),
    length=st.integers(1, 300),
    tau=st.sampled_from([0.0, 0.1, 1.0]),
    block_size=st.sampled_from([16, 32]),
)
def test_gamma_one_selects_every_causal_block(seed: int, length: int, tau: float, block_size: int) -> None:
    config = paper_config(gamma=1, tau=tau, min_budget=0, block_size=block_size)
    query, key = structured_qk(seed, 1, 5, 1, length, 16, block_size=block_size, strength=200, dtype=torch.float32)
    dense = create_prefill_block_mask(query, key, config).to_dense().bool()
    assert torch.equal(dense, torch.ones_like(dense).tril())


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32),
    length=st.integers(1, 300),
    gamma=st.floats(0.1, 0.99),
    block_size=st.sampled_from([16, 32]),
    structured=st.booleans(),
)
def test_selected_columns_and_diagonals_cover_gamma_each(
    seed: int, length: int, gamma: float, block_size: int, structured: bool
) -> None:
    config = paper_config(gamma=gamma, tau=0, min_budget=0, block_size=block_size)
    sizes = (seed, 1, 5, 1, length, 16)
    query, key = structured_qk(*sizes, block_size=block_size) if structured else random_qk(*sizes)
    selected = select_prefill_blocks(query, key, None, 0.25, config)
    num_blocks = selected.shape[-1]
    weights = representative_weights(query, key, 0.25, block_size)
    num_rows = weights.shape[-2]

    row, column = torch.arange(num_blocks)[:, None], torch.arange(num_blocks)
    # Column 0, the diagonal and the corner are always there: whole or not, they tell nothing and are left in.
    whole_columns = (selected | (row < column)).all(-2)
    by_column = whole_columns.unsqueeze(-2) & (row >= column)
    assert (covered_share(weights, by_column, block_size) >= gamma - 1e-9).all()

    whole_diagonals = torch.stack(
        [selected.diagonal(-offset, dim1=-2, dim2=-1).all(-1) for offset in range(num_blocks)], dim=-1
    )
    offsets = torch.arange(length - num_rows, length)[:, None] - torch.arange(length)
    own, share_of_next = offsets.clamp(min=0) // block_size, offsets.clamp(min=0) % block_size / block_size
    is_whole = whole_diagonals.double()
    kept_share = is_whole[..., own] * (1 - share_of_next)
    kept_share = kept_share + is_whole[..., (own + 1).clamp(max=num_blocks - 1)] * share_of_next
    assert ((weights * kept_share).sum((-2, -1)) / num_rows >= gamma - 1e-9).all()


SELECT_CASES = [(1, 1, 1, 16, 8), (1, 4, 2, 100, 16), (2, 2, 2, 77, 8), (2, 6, 1, 33, 24), (1, 1, 1, 1, 8)]


def draw_qkv(sizes: tuple[int, int, int, int, int], *, strided: bool, dtype: torch.dtype) -> list[Tensor]:
    """Return query, key and value; strided ones are (B, S, H, D) in memory, as models make them."""
    query, key = random_qk(0, *sizes, dtype=dtype)
    tensors = [query, key, key.flip(-2)]
    return [x.transpose(1, 2).contiguous().transpose(1, 2) if strided else x for x in tensors]


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("sizes", SELECT_CASES)
def test_select_blocks_passes_opcheck(sizes: tuple[int, int, int, int, int], strided: bool) -> None:
    query, key, value = draw_qkv(sizes, strided=strided, dtype=torch.float32)
    for gamma, max_budget, given_value in [(0.8, None, value), (0.8, 32, None), (1.0, None, value)]:
        arguments = (query, key, given_value, 0.3, [gamma], 0.1, 16, max_budget, 16, 0, "flexprefill")
        torch.library.opcheck(torch.ops.flexprefill.select_blocks.default, arguments)


@pytest.mark.parametrize("x", [torch.randn(2, 3, 5, 4), torch.randn(2, 5, 3, 4).transpose(1, 2), torch.randn(6)[::2]])
def test_realize_passes_opcheck(x: Tensor) -> None:
    torch.library.opcheck(torch.ops.flexprefill.realize.default, (x,))


@pytest.mark.parametrize("x", [torch.randn(2, 3, 5, 4), torch.randn(2, 5, 3, 4).transpose(1, 2)])
def test_realize_copies_to_contiguous(x: Tensor) -> None:
    copy = torch.ops.flexprefill.realize(x)
    assert copy.is_contiguous()
    assert torch.equal(copy, x)
    assert copy.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("sizes", SELECT_CASES)
def test_strided_inputs_select_the_same(sizes: tuple[int, int, int, int, int]) -> None:
    whole, strided = (draw_qkv(sizes, strided=strided, dtype=torch.float64) for strided in (False, True))
    assert torch.equal(
        select_prefill_blocks(*whole, 0.3, CONFIG),
        select_prefill_blocks(strided[0], strided[1], strided[2], 0.3, CONFIG),
    )


def select_with_op(query: Tensor, key: Tensor, value: Tensor | None) -> Tensor:
    """Return the selection of the op as a grid, (B, H, N, N) bool."""
    counts, indices, full_counts, full_indices = torch.ops.flexprefill.select_blocks(
        query, key, value, 0.25, [0.4], 0.1, 0, None, 16, 0, "flexprefill"
    )
    columns = torch.arange(indices.shape[-1])
    grid = torch.zeros(indices.shape, dtype=torch.bool)
    for count, index in [(counts, indices), (full_counts, full_indices)]:
        grid |= torch.zeros_like(grid).scatter_(-1, index.long(), columns < count.unsqueeze(-1))
    return grid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("position", [0, 70, 199])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("poisoned", "heads"), [(0, [3]), (1, [2, 3]), (2, [2, 3])])
def test_heads_that_read_nan_or_inf_get_every_causal_block_and_no_other_head_does(
    poisoned: int, heads: list[int], poison: float, position: int, dtype: torch.dtype
) -> None:
    tensors = [x.clone() for x in draw_qkv((2, 4, 2, 200, 16), strided=False, dtype=dtype)]
    tensors[0][:, ::2] *= 0.1  # query-aware
    expected = select_with_op(*tensors)
    causal = torch.ones(13, 13, dtype=torch.bool).tril()
    assert (expected != causal).flatten(2).any(-1).all(), "the scenario: no head needs every block"
    tensors[poisoned][1, -1, position, 5] = poison
    expected[1, heads] = causal
    assert torch.equal(select_with_op(*tensors), expected)


def test_head_whose_scores_overflow_gets_every_causal_block() -> None:
    query, key = random_qk(0, 1, 2, 1, 200, 16, dtype=torch.float32)
    query[0, 1, -1] = 1e25
    key[0, 0, 3] = 1e25
    selected = select_with_op(query, key, None)
    causal = torch.ones(13, 13, dtype=torch.bool).tril()
    assert torch.equal(selected[0, 1], causal)


def test_head_whose_pooled_scores_overflow_gets_every_causal_block() -> None:
    query, key = random_qk(0, 1, 1, 1, 200, 16, dtype=torch.float32)
    # The representative queries are small, so that their own scores are finite.
    query, key = 1e-16 * query, 1e15 + 1e13 * key
    query[:, :, 64:80] = 1e25
    selected = select_prefill_blocks(query, key, None, 1.0, paper_config(tau=1, min_budget=0, block_size=16))
    assert torch.equal(selected, torch.ones_like(selected).tril())


def test_gamma_1_selects_every_block_under_a_ceiling_that_does_not_bind() -> None:
    query, key = random_qk(0, 1, 2, 1, 200, 16, dtype=torch.float32)
    config = paper_config(gamma=1, min_budget=0, max_budget=10**6, block_size=16)
    selected = select_prefill_blocks(100 * query, key, None, 1.0, config)
    assert torch.equal(selected, torch.ones_like(selected).tril())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_finite_values_are_no_reason_for_every_block(dtype: torch.dtype) -> None:
    query, key = random_qk(0, 1, 2, 1, 200, 16, dtype=dtype)
    clean = select_with_op(query, key, torch.zeros_like(key))
    assert torch.equal(select_with_op(query, key, torch.full_like(key, torch.finfo(dtype).max)), clean)


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_no_tensor_is_larger_than_the_documented_bound(tau: float) -> None:
    heads, length, block_size = 4, 4096, 128
    query, key = random_qk(0, 1, heads, 2, length, 32, dtype=torch.bfloat16)
    config = paper_config(tau=tau, min_budget=256, max_budget=1024, block_size=block_size)
    with RecordSizes() as sizes:
        select_prefill_blocks(query, key, key, 32**-0.5, config)
    num_rows = heads * block_size
    # A chunk of scores, and beside it the block of zeros in which its diagonals are sheared straight.
    bound = max(SCORES_AT_ONCE["cpu"], num_rows * block_size) + num_rows * block_size
    assert num_rows * length > bound, "the scenario: the scores don't fit at once"
    assert sizes.largest <= bound
    assert sizes.largest < heads * length**2


@pytest.mark.parametrize("length", [1024, 4096])
def test_largest_tensor_does_not_grow_with_the_square_of_the_length(length: int) -> None:
    query, key = random_qk(0, 1, 1, 1, length, 8, dtype=torch.float32)
    with RecordSizes() as sizes:
        select_prefill_blocks(query, key, key, 1.0, paper_config(block_size=64, min_budget=0))
    # The scores of the representative queries, sheared, and the masks of the block grid.
    assert sizes.largest <= 64 * (length + 64)
