"""gamma = 1 is dense attention; below it, the result is exact attention over the selected blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.models import OPTIONS, attend_in_float64, causal_attention, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flexprefill_compile import SparsePrefillConfig
from flexprefill_compile.backend import FlexPrefillBackend
from flexprefill_compile.block_masks import create_prefill_block_mask

HEADS = st.sampled_from([(4, 4), (4, 2), (3, 1)])


def random_inputs(batch: int, heads: tuple[int, int], length: int, head_dim: int) -> list[Tensor]:
    num_heads, num_kv_heads = heads
    return [torch.randn(batch, n, length, head_dim) for n in (num_heads, num_kv_heads, num_kv_heads)]


def compile_attention(dynamic: bool, **options: Any) -> tuple[Any, FlexPrefillBackend]:
    backend = FlexPrefillBackend()
    return torch.compile(causal_attention, backend=backend, dynamic=dynamic, options=OPTIONS | options), backend


def assert_equals_dense(actual: Tensor, inputs: list[Tensor]) -> None:
    """The error against float64 is of the size of dense attention's own."""
    causal = torch.ones(actual.shape[-2], actual.shape[-2], dtype=torch.bool).tril()
    exact = attend_in_float64(*inputs, causal)
    allowed = 4 * relative_error(causal_attention(*inputs), exact) + torch.finfo(actual.dtype).eps
    assert relative_error(actual, exact) <= allowed


@settings(max_examples=8, deadline=None)
@given(
    batch=st.integers(1, 3), heads=HEADS, length=st.integers(64, 400), head_dim=st.sampled_from([16, 40, 64, 128, 256])
)
def test_gamma_1_equals_dense_for_static_shapes(batch: int, heads: tuple[int, int], length: int, head_dim: int) -> None:
    torch.compiler.reset()
    inputs = random_inputs(batch, heads, length, head_dim)
    attend, backend = compile_attention(dynamic=False, gamma=1.0)
    with torch.no_grad():
        assert_equals_dense(attend(*inputs), inputs)
    assert backend.report.num_rewritten == 1


@pytest.mark.parametrize("head_dim", [16, 64, 256])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_gamma_1_equals_dense_for_dynamic_shapes(heads: tuple[int, int], head_dim: int) -> None:
    attend, backend = compile_attention(dynamic=True, gamma=1.0)

    @settings(max_examples=12, deadline=None)
    @given(batch=st.integers(2, 3), length=st.integers(64, 700))
    def check(batch: int, length: int) -> None:
        inputs = random_inputs(batch, heads, length, head_dim)
        with torch.no_grad():
            assert_equals_dense(attend(*inputs), inputs)

    with torch.no_grad():
        attend(*random_inputs(3, heads, 77, head_dim))  # first, sizes that dynamo can't take for one another
    check()
    assert [site.rewritten for site in backend.report.sites] == [True], "one graph for every length"


def test_below_gamma_1_the_result_is_exact_over_the_selected_blocks() -> None:
    query, key, value = random_inputs(2, (4, 2), 333, 32)
    query[:, 0] *= 4
    attend, _ = compile_attention(dynamic=False, gamma=0.6)
    with torch.no_grad():
        actual = attend(query, key, value)
    config = SparsePrefillConfig(gamma=0.6, block_size=32, min_budget=0)
    blocks = create_prefill_block_mask(query, key, config).to_dense().bool()
    tokens = blocks.repeat_interleave(32, -1).repeat_interleave(32, -2)[..., :333, :333]
    causal = torch.ones(333, 333, dtype=torch.bool).tril()
    assert not tokens.logical_or(~causal).all(), "the selection must leave something out"
    assert relative_error(actual, attend_in_float64(query, key, value, tokens & causal)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_dense(dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in random_inputs(2, (4, 2), 200, 64)]
    attend, backend = compile_attention(dynamic=False, gamma=1.0)
    with torch.no_grad():
        actual = attend(*inputs)
    assert actual.dtype == dtype
    assert backend.report.num_rewritten == 1
    assert_equals_dense(actual, inputs)


def test_value_heads_may_have_their_own_dimension() -> None:
    query, key, _ = random_inputs(2, (4, 2), 200, 32)
    inputs = [query, key, torch.randn(2, 2, 200, 48)]
    attend, backend = compile_attention(dynamic=False, gamma=1.0)
    with torch.no_grad():
        assert_equals_dense(attend(*inputs), inputs)
    assert backend.report.num_rewritten == 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_and_inf_reach_the_rows_that_they_reach_in_dense_attention(which: int, bad: float) -> None:
    position, block_start = 40, 32
    inputs = random_inputs(2, (4, 2), 333, 16)
    inputs[which][0, 1, position, 3] = bad
    attend, backend = compile_attention(dynamic=False, gamma=0.5)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        expected = causal_attention(*inputs).isfinite().all(-1)
        actual = attend(*inputs).isfinite().all(-1)
    assert backend.report.num_rewritten == 1
    # Before the position dense backends differ among themselves: some let masked values leak, NaN times 0.
    assert not expected[0, :, position:].all()
    assert torch.equal(actual[..., position:], expected[..., position:])
    assert actual[..., :block_start].all()


@pytest.mark.parametrize("scale", [0.5, 1])
def test_any_constant_scale(scale: float) -> None:
    inputs = random_inputs(2, (4, 4), 200, 16)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)

    compiled = torch.compile(attend, backend="flexprefill", options=OPTIONS | {"gamma": 1.0})
    with torch.no_grad():
        assert relative_error(compiled(*inputs), attend(*inputs).double()) < 1e-6


def test_a_scale_that_depends_on_the_length() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scale = 4.0 / query.shape[-2] ** 0.5
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)

    backend = FlexPrefillBackend()
    compiled = torch.compile(attend, backend=backend, dynamic=True, options=OPTIONS | {"gamma": 1.0})
    with torch.no_grad():
        for length in (100, 200):
            inputs = random_inputs(2, (4, 4), length, 16)
            assert relative_error(compiled(*inputs), attend(*inputs).double()) < 1e-6
    assert all(site.rewritten for site in backend.report.sites)
