"""Positions in dtypes that round or wrap: the formula reads the numbers that the model compares."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.checked_attention import without_code_generation
from torch import Tensor
from torch.nn import functional as F

from flexprefill_compile.backend import FlexPrefillBackend
from flexprefill_compile.report import RewriteReport, SkipReason

LENGTH = 600
NARROW = (torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16)
WIDE = (torch.int32, torch.int64, torch.float32, torch.float64)
Hide = Callable[[Tensor, torch.dtype], Tensor]


def compare(index: Tensor, dtype: torch.dtype) -> Tensor:
    position = index.to(dtype)
    return position[None, :].to(dtype) <= position[:, None]


def range_of_dtype(index: Tensor, dtype: torch.dtype) -> Tensor:
    position = torch.arange(len(index), dtype=dtype)
    return position[None, :] <= position[:, None]


def subtract(index: Tensor, dtype: torch.dtype) -> Tensor:
    position = index.to(dtype)
    return position[:, None] - position[None, :] >= 0


def within_window(index: Tensor, dtype: torch.dtype) -> Tensor:
    position = index.to(dtype)
    distance = position[:, None] - position[None, :]
    return (index[:, None] >= index) & (distance < 300)


def attend(make: Hide, dtype: torch.dtype) -> Callable[..., Tensor]:
    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = make(torch.arange(LENGTH), dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    return call


def run(call: Callable[..., Tensor], *, generate: bool) -> RewriteReport:
    """Compile at gamma 1 and compare with eager."""
    query, key, value = torch.randn(3, 1, 1, LENGTH, 16)
    backend = FlexPrefillBackend()
    options = {"gamma": 1.0, "min_length": 256, "block_size": 64}
    with torch.no_grad():
        expected = call(query, key, value)
        if generate:
            actual = torch.compile(call, backend=backend, options=options)(query, key, value)
        else:
            with without_code_generation():
                actual = torch.compile(call, backend=backend, options=options)(query, key, value)
    torch.testing.assert_close(actual, expected)
    return backend.report


@pytest.mark.parametrize("dtype", [*NARROW, *WIDE], ids=str)
@pytest.mark.parametrize("make", [compare, range_of_dtype, subtract, within_window])
def test_the_mask_is_that_of_the_numbers_compared(make: Hide, dtype: torch.dtype) -> None:
    run(attend(make, dtype), generate=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=str)
def test_so_is_the_mask_of_generated_code(dtype: torch.dtype) -> None:
    assert run(attend(compare, dtype), generate=True).num_rewritten == 1


def test_rounded_differences_are_not_compared() -> None:
    (site,) = run(attend(within_window, torch.bfloat16), generate=False).sites
    assert site.reason is SkipReason.MASK_NOT_LIFTED
    assert site.detail == "it compares numbers that a low precision rounds"


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_dtypes_that_hold_every_position_are_positions(dtype: torch.dtype) -> None:
    report = run(attend(compare, dtype), generate=False)
    assert report.num_rewritten == 1
