"""The faults of the paper's reference code, by their number in our list, and that ours has none of them."""

from __future__ import annotations

import collections
import math

import pytest
import torch
from helpers.inputs import (
    CountOps,
    covered_share,
    paper_config,
    qk_of_scores,
    random_qk,
    representative_weights,
    structured_qk,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flexprefill_compile.block_masks.estimators.flexprefill.patterns import compute_js_distance, is_query_aware
from flexprefill_compile.block_masks.estimators.flexprefill.reference import select_head
from flexprefill_compile.block_masks.estimators.flexprefill.representative import compute_representative_attention
from flexprefill_compile.block_masks.layout import count_blocks
from flexprefill_compile.block_masks.prefill import select_prefill_blocks
from flexprefill_compile.block_masks.select import select_cumulative
from flexprefill_compile.settings.config import SparsePrefillConfig


def vertical_slash(gamma: float, *, block_size: int = 32, min_budget: int = 0) -> SparsePrefillConfig:
    """Return a config under which every head is vertical-slash and, by default, budgets add nothing."""
    return paper_config(gamma=gamma, tau=0, min_budget=min_budget, block_size=block_size)


def count_ops(batch: int, heads: int, kv_heads: int) -> collections.Counter[str]:
    """Return how often each op runs in a selection with every step in it."""
    query, key = random_qk(0, batch, heads, kv_heads, 200, 16, dtype=torch.float32)
    config = paper_config(min_budget=32, max_budget=64, block_size=16)
    with CountOps() as ops:
        select_prefill_blocks(query, key, key, 0.25, config)
    return ops.counts


@pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(1, 16, 4), (5, 4, 1), (3, 8, 8)])
def test_fault_1_no_python_loop_over_heads_or_prompts(batch: int, heads: int, kv_heads: int) -> None:
    """Fault 1: host syncs, and Python loops over heads. CountOps itself fails on the syncs."""
    assert count_ops(batch, heads, kv_heads) == count_ops(1, 2, 1)


def test_fault_1_no_shape_depends_on_data() -> None:
    """Fault 1: fake tensors hold no data, so a host sync of any kind raises."""
    with FakeTensorMode():
        query, key = torch.empty(2, 4, 200, 16), torch.empty(2, 2, 200, 16)
        config = paper_config(min_budget=32, max_budget=64, block_size=16)
        assert select_prefill_blocks(query, key, key, 0.25, config).shape == (2, 4, 13, 13)


def test_fault_2_scattered_columns_are_covered() -> None:
    """Fault 2: counting the tokens that reach gamma and dividing by the block gives too few blocks."""
    length, block_size, gamma, num_stripes = 8192, 128, 0.95, 100
    generator = torch.Generator().manual_seed(0)
    query, key = random_qk(0, 1, 1, 1, length, 16)
    stripes = torch.randperm(length, generator=generator)[:num_stripes]
    query[..., 0], key[..., 0] = 12, 0
    key[..., stripes, 0] = 1
    query[..., 1:] *= 0.1

    weights = representative_weights(query, key, 1.0, block_size)
    columns = weights.sum((0, 1, 2)) / block_size
    num_tokens = int(select_cumulative(columns, gamma).sum())
    blocks = columns.unflatten(-1, (-1, block_size)).sum(-1)
    counted = blocks.topk(math.ceil(num_tokens / block_size)).values.sum()
    assert counted < 0.5, "the scenario: what the reference code would select"

    selected = select_prefill_blocks(query, key, None, 1.0, vertical_slash(gamma, block_size=block_size))
    assert (covered_share(weights, selected, block_size) >= gamma).all()
    assert not selected[0, 0, -1].all()


@settings(deadline=None, max_examples=20)
@given(diagonal=st.integers(1, 5), remainder=st.integers(5, 27))
def test_fault_3_token_diagonal_selects_both_block_diagonals(diagonal: int, remainder: int) -> None:
    """Fault 3: a token diagonal between two block diagonals selects one of them only."""
    length, block_size, offset = 256, 32, 32 * diagonal + remainder
    scores = torch.zeros(1, length, length)
    scores.diagonal(-offset, dim1=-2, dim2=-1).fill_(20)
    selected = select_prefill_blocks(*qk_of_scores(scores), None, 1.0, vertical_slash(0.9))
    # The smaller share of 5 / 32 at least is needed to reach 0.9.
    query_index = torch.arange(offset, length)
    assert selected[0, 0, query_index // block_size, (query_index - offset) // block_size].all()
    assert selected[0, 0].diagonal(-diagonal).all()
    assert selected[0, 0].diagonal(-diagonal - 1).all()


@pytest.mark.parametrize("length", range(225, 257, 3))
def test_fault_4_slash_falls_on_the_same_block_diagonals_at_every_length(length: int) -> None:
    """Fault 4: the bucket of a diagonal shifts with the length modulo the block."""
    block_size, offset = 32, 72
    scores = torch.zeros(1, length, length)
    scores.diagonal(-offset, dim1=-2, dim2=-1).fill_(20)
    query, key = qk_of_scores(scores)
    attention = compute_representative_attention(query[:, :, -block_size:], key, 1.0, block_size)
    expected = torch.zeros(8)
    expected[2], expected[3] = 24 / 32, 8 / 32
    torch.testing.assert_close(attention.diagonals[0, 0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", range(225, 257, 3))
def test_fault_4_columns_stay_in_their_block_at_every_length(length: int) -> None:
    """Fault 4: the last block is treated as full when it is ragged."""
    scores = torch.zeros(1, length, length)
    scores[..., 95], scores[..., 96] = 20, 20 + math.log(3)
    query, key = qk_of_scores(scores)
    attention = compute_representative_attention(query[:, :, -32:], key, 1.0, 32)
    expected = torch.zeros(8)
    expected[2], expected[3] = 1 / 4, 3 / 4
    torch.testing.assert_close(attention.columns[0, 0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize("length", [225, 240, 255])
def test_fault_4_ragged_last_block_averages_its_own_tokens(length: int, tau: float) -> None:
    """Fault 4: a mean over the padded last block is not the mean of its tokens."""
    query, key = random_qk(0, 1, 4, 1, length, 16, spread=3)
    config = paper_config(gamma=0.6, tau=tau, min_budget=0, block_size=32)
    selected = select_prefill_blocks(query, key, None, 0.25, config)
    for head in range(4):
        assert torch.equal(selected[0, head], select_head(query[0, head], key[0, 0], 0.25, config).blocks)


@pytest.mark.parametrize("length", [225, 240, 255])
def test_fault_4_both_rows_that_hold_representative_queries_reach_gamma(length: int) -> None:
    """Fault 4: when the last block is ragged, the representative queries straddle two block rows."""
    query, key = structured_qk(0, 1, 5, 1, length, 32, block_size=32)
    weights = representative_weights(query, key, 32**-0.5, 32)
    selected = select_prefill_blocks(query, key, None, 32**-0.5, vertical_slash(0.8))
    assert (covered_share(weights, selected, 32) >= 0.8).all()


def test_fault_5_sink_and_diagonal_add_to_the_floor() -> None:
    """Fault 5: the sink and the diagonal consume the budget."""
    scores = torch.zeros(1, 256, 256)
    scores[..., 0] = 30
    selected = select_prefill_blocks(*qk_of_scores(scores), None, 1.0, vertical_slash(0.5, min_budget=64))
    assert selected[0, 0, :, 0].all()
    assert selected[0, 0].diagonal().all()
    # Two blocks of 32 tokens beside them, where a row has as many.
    assert (selected[0, 0].sum(-1) >= torch.tensor([1, 2, 3, 4, 4, 4, 4, 4])).all()


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_fault_5_sink_and_diagonal_add_to_the_ceiling(tau: float) -> None:
    """Fault 5: the sink and the diagonal consume the budget."""
    query, key = random_qk(0, 1, 3, 1, 256, 16)
    config = paper_config(gamma=1, tau=tau, min_budget=0, max_budget=64, block_size=32)
    selected = select_prefill_blocks(query, key, None, 0.25, config)
    assert selected[..., 0].all()
    assert selected.diagonal(dim1=-2, dim2=-1).all()
    assert torch.equal(selected.sum(-1), torch.tensor([1, 2, 3, 4, 4, 4, 4, 4]).expand(1, 3, -1))


@pytest.mark.parametrize(("gamma", "blocks"), [(0.4, {2}), (0.6, {2, 4}), (0.9, {2, 4, 6})])
def test_fault_6_block_that_crosses_gamma_is_kept(gamma: float, blocks: set[int]) -> None:
    """Fault 6: the block whose mass crosses gamma is dropped, so that gamma is never reached."""
    length = 320
    scores = torch.full((1, length, length), -30.0)
    for column, mass in [(70, 0.5), (140, 0.3), (200, 0.2)]:
        scores[..., column] = math.log(mass)
    query, key = qk_of_scores(scores)
    selected = select_prefill_blocks(query, key, None, 1.0, vertical_slash(gamma))
    whole_columns = {column for column in range(1, 9) if selected[0, 0, column:, column].all()}
    assert whole_columns == blocks
    assert (covered_share(representative_weights(query, key, 1.0, 32), selected, 32) >= gamma).all()


def test_fault_7_zero_bins_have_a_finite_distance() -> None:
    """Fault 7: the divergence is NaN where a bin is zero."""
    p = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.5, 0.5, 0.0]])
    q = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.25, 0.75, 0.0]])

    def divergence_from(x: Tensor, y: Tensor) -> Tensor:
        return torch.xlogy(x, x).sub(torch.xlogy(x, y)).nan_to_num().sum(-1)

    mean = (p + q) / 2
    expected = ((divergence_from(p, mean) + divergence_from(q, mean)) / 2).sqrt()
    torch.testing.assert_close(compute_js_distance(p, q), expected, rtol=0, atol=1e-4)
    assert compute_js_distance(p, q)[:2].tolist() == pytest.approx([math.sqrt(math.log(2)), 0], abs=1e-6)


def test_fault_7_head_with_a_zero_bin_stays_query_aware() -> None:
    """Fault 7: NaN < tau is false, so that the head silently becomes vertical-slash."""
    length, block_size = 512, 32
    scores = torch.zeros(1, length, length)
    scores[..., 64:96] = -1000  # both estimates of this block are exactly zero
    query, key = qk_of_scores(scores)
    representative = query[:, :, -block_size:]
    columns = compute_representative_attention(representative, key, 1.0, block_size).columns
    assert columns[0, 0, 2] == 0
    pooled_key = key.unflatten(-2, (-1, block_size)).mean(-2)
    assert is_query_aware(representative.mean(-2, keepdim=True), pooled_key, columns, 1.0, tau=0.1).all()

    config = paper_config(gamma=0.7, tau=0.1, min_budget=0, block_size=block_size)
    selected = select_prefill_blocks(query, key, None, 1.0, config)
    assert not torch.equal(selected, select_prefill_blocks(query, key, None, 1.0, vertical_slash(0.7)))


@pytest.mark.parametrize("tau", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("scale", [0.1, 0.25, 1.5])
def test_fault_8_scale_is_that_of_the_scores(scale: float, tau: float) -> None:
    """Fault 8: the estimate takes 1 / sqrt(D) whatever scale the attention has."""
    query, key = random_qk(0, 1, 3, 1, 200, 16, spread=2)
    config = paper_config(gamma=0.8, tau=tau, min_budget=0, block_size=16)
    selected = select_prefill_blocks(query, key, None, scale, config)
    assert torch.equal(selected, select_prefill_blocks(query * scale, key, None, 1.0, config))
    assert not torch.equal(selected, select_prefill_blocks(query, key, None, 4 * scale, config))


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
def test_fault_8_pattern_is_judged_at_the_scale_of_the_scores(scale: float) -> None:
    """Fault 8: at another scale a perfect estimate looks wrong."""
    scores = torch.linspace(0, 4, 16, dtype=torch.float64).repeat_interleave(32).expand(1, 512, 512)
    query, key = qk_of_scores(scores / scale)
    by_tau = [
        select_prefill_blocks(query, key, None, scale, paper_config(gamma=0.8, tau=tau, min_budget=0, block_size=32))
        for tau in (0.1, 1.0, 0.0)
    ]
    assert torch.equal(by_tau[0], by_tau[1])
    assert not torch.equal(by_tau[0], by_tau[2])


def test_fault_8_no_mask_is_kept_between_calls_of_other_shapes() -> None:
    """Fault 8: a causal mask is cached in a global under no key."""
    sizes = [(1, 2, 1, 200, 16), (2, 2, 2, 77, 16), (1, 4, 1, 330, 8), (1, 2, 1, 200, 16)]
    for size, block_size in zip(sizes, [32, 16, 64, 16], strict=True):
        query, key = random_qk(0, *size)
        config = paper_config(gamma=0.8, min_budget=16, block_size=block_size)
        selected = select_prefill_blocks(query, key, None, 0.3, config)
        group = query.shape[1] // key.shape[1]
        for batch, head in torch.cartesian_prod(torch.arange(query.shape[0]), torch.arange(query.shape[1])).tolist():
            expected = select_head(query[batch, head], key[batch, head // group], 0.3, config).blocks
            assert torch.equal(selected[batch, head], expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fault_8_no_mask_is_kept_between_calls_on_other_devices() -> None:
    """Fault 8: a causal mask is cached in a global under no key."""
    query, key = random_qk(0, 2, 4, 2, 200, 16)
    config = paper_config(gamma=0.8, min_budget=16, block_size=16)
    on_cpu = select_prefill_blocks(query, key, None, 0.25, config)
    on_gpu = select_prefill_blocks(query.cuda(), key.cuda(), None, 0.25, config)
    assert on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu(), on_cpu)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_fault_9_any_batch_dtype_and_grouping_of_heads(dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    """Fault 9: only batch 1, only bfloat16; head h reads key head h // (H / Hkv)."""
    query, key = structured_qk(0, 3, heads, kv_heads, 180, 32, block_size=16, dtype=dtype)
    config = paper_config(gamma=0.9, min_budget=0, block_size=16)
    selected = select_prefill_blocks(query, key, None, 32**-0.5, config)
    num_blocks = count_blocks(180, 16)
    assert selected.shape == (3, heads, num_blocks, num_blocks)
    for batch in range(3):
        for head in range(heads):
            own_query = query[batch : batch + 1, head : head + 1]
            own_key = key[batch : batch + 1, head * kv_heads // heads][:, None]
            alone = select_prefill_blocks(own_query, own_key, None, 32**-0.5, config)
            assert torch.equal(selected[batch, head], alone[0, 0])
