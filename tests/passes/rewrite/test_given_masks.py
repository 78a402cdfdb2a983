"""Masks that the model is given: sparse where they are causal, every block that they allow where they are not."""

from __future__ import annotations

import pytest
import torch
from helpers.checked_attention import without_code_generation
from torch import Tensor
from torch.nn import functional as F

from flexprefill_compile.backend import FlexPrefillBackend
from flexprefill_compile.block_masks import record_densities

LENGTH = 512
OPTIONS = {"gamma": 0.3, "min_budget": 0, "min_length": 64, "block_size": 32}
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
POSITION = torch.arange(LENGTH)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def run(mask: Tensor, gamma: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, eager's output and the densities."""
    torch.manual_seed(0)
    inputs = *torch.randn(3, mask.shape[0], 2, LENGTH, 16), mask
    compiled = torch.compile(attend, backend=FlexPrefillBackend(), options=OPTIONS | {"gamma": gamma})
    with torch.no_grad(), without_code_generation(is_dense=False), record_densities() as densities:
        actual = compiled(*inputs)
    return actual, attend(*inputs), densities[0]


def test_a_causal_one_runs_sparse() -> None:
    actual, expected, densities = run(CAUSAL[None, None])
    assert (densities < 1).all()
    assert not torch.allclose(actual, expected)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool),
        (POSITION < 400)[None, None, None].expand(1, 1, LENGTH, LENGTH),
        (CAUSAL | (POSITION < 100))[None, None],
        torch.where(CAUSAL | (POSITION < 100), 0.0, -torch.inf)[None, None],
    ],
    ids=["everything", "bidirectional under padding", "prefix", "additive prefix"],
)
def test_one_that_looks_ahead_computes_every_block_that_it_allows(mask: Tensor) -> None:
    actual, expected, _ = run(mask)
    torch.testing.assert_close(actual, expected)


def test_each_prompt_of_a_batch_by_itself() -> None:
    actual, expected, _ = run(torch.stack([CAUSAL, CAUSAL | (POSITION < 100)])[:, None])
    torch.testing.assert_close(actual[1], expected[1])
    assert not torch.allclose(actual[0], expected[0])
