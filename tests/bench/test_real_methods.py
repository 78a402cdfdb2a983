"""The methods of bench-real: each runs as it says, however many there are."""

from __future__ import annotations

import pytest
import torch

from flexprefill_compile.bench.real.methods import create_methods, create_sparse_method
from flexprefill_compile.block_masks import record_densities
from flexprefill_compile.errors import UsageError


def test_no_number_of_methods_and_lengths_makes_dynamo_give_up() -> None:
    """Beyond eight compilations of one code object, dynamo runs it uncompiled, which is dense."""
    methods = [create_sparse_method(f"estimator=streaming,block_size=16,min_budget={16 * n}") for n in range(1, 6)]
    with torch.no_grad(), record_densities() as densities:
        for length in (256, 320):
            for method in methods:
                method.attend(*torch.randn(3, 1, 2, length, 16))
    found = torch.stack([density.mean() for density in densities]).unflatten(0, (2, 5))
    assert (found.diff(dim=1) > 0).all()


def test_dense_comes_first_and_peers_last() -> None:
    methods = create_methods("cpu", ["default"], ["helpers.models:causal_attention"])
    assert [method.name for method in methods] == ["dense flash", "default", "helpers.models:causal_attention"]
    assert [method.is_dense for method in methods] == [True, False, False]


def test_an_option_needs_a_name_and_a_value() -> None:
    with pytest.raises(UsageError, match=r"--sparse must be NAME=VALUE,\.\.\. or default, got '=3'"):
        create_sparse_method("=3")
