"""Whether settings can leave anything out: as the selection itself has it, at the edge."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexprefill_compile import LayerPolicy, ModelShape, Policy, SparsePrefillConfig
from flexprefill_compile.block_masks.layout import count_causal_blocks
from flexprefill_compile.block_masks.prefill import select_prefill_blocks
from flexprefill_compile.errors import UsageError
from flexprefill_compile.quality.sparsity import check_sparsity

SETTINGS: dict[str, Any] = {"block_size": 16, "gamma": 0.01, "estimator": "flexprefill"}


@pytest.mark.parametrize("min_budget", [16, 40, 64])
def test_a_prompt_is_refused_exactly_where_every_block_is_computed(min_budget: int) -> None:
    config = SparsePrefillConfig(min_budget=min_budget, **SETTINGS)
    for length in range(32, 130):
        query = torch.randn(1, 32, length, 16)  # one head may select every block by chance
        selected = select_prefill_blocks(query, query, None, 0.25, config)
        if bool(selected.sum() == 32 * count_causal_blocks(selected.shape[-1])):
            with pytest.raises(UsageError, match=rf"^min_budget {min_budget} computes every block"):
                check_sparsity(length, config)
        else:
            check_sparsity(length, config)


def test_less_than_two_blocks_are_refused_and_dense_settings_are_not() -> None:
    config = SparsePrefillConfig()
    with pytest.raises(UsageError, match="must be of two blocks at least, 256 tokens, got 255"):
        check_sparsity(255, config)
    check_sparsity(300, SparsePrefillConfig(gamma=1.0))
    check_sparsity(300, SparsePrefillConfig(estimator="dense"))


def test_the_least_floor_of_a_policy_counts() -> None:
    shape = ModelShape(architecture="LlamaForCausalLM", num_layers=2, num_heads=4)
    config = SparsePrefillConfig(min_budget=1024)
    with pytest.raises(UsageError):
        check_sparsity(1024, config)
    check_sparsity(1024, SparsePrefillConfig(min_budget=1024, policy=Policy(shape, {1: LayerPolicy(min_budget=128)})))
