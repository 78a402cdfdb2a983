"""What the benchmark says of a selection, on selections whose loss is known."""

from __future__ import annotations

import pytest
import torch

from flexprefill_compile.bench.selection_quality import measure_disagreement, measure_error, measure_recall
from flexprefill_compile.block_masks.layout import create_causal_grid, pack_causal_blocks
from flexprefill_compile.block_masks.prefill import select_prefill_blocks
from flexprefill_compile.settings.config import SparsePrefillConfig


def test_recall_counts_what_is_kept() -> None:
    query, key = torch.zeros(1, 2, 256, 16), torch.zeros(1, 1, 256, 16)
    everything = create_causal_grid(4, query.device).expand(1, 2, -1, -1)
    whole = measure_recall(query, key, pack_causal_blocks(everything), 0.25, 64)
    assert whole["worst"] == pytest.approx(1)
    # Equal scores: of row i the diagonal block keeps (i % 64 + 1) / (i + 1).
    diagonal = measure_recall(query, key, pack_causal_blocks(everything & torch.eye(4, dtype=torch.bool)), 0.25, 64)
    rows = torch.randint(0, 256, (64,), generator=torch.Generator().manual_seed(0))
    assert diagonal["mean"] == pytest.approx(((rows % 64 + 1) / (rows + 1)).mean().item(), rel=1e-5)


def test_error_is_relative() -> None:
    exact = torch.randn(1, 3, 5, 7)
    assert measure_error(exact * 1.25, exact) == pytest.approx(0.25)


def test_disagreement_counts_blocks() -> None:
    query, key, value = (torch.randn(1, heads, 700, 16) for heads in (2, 1, 1))
    config = SparsePrefillConfig(gamma=0.6, min_budget=0)
    blocks = select_prefill_blocks(query, key, value, 0.25, config)
    assert measure_disagreement(query, key, value, pack_causal_blocks(blocks), config) == 0
    other = blocks.clone()
    other[0, 0, 5, 2:4] ^= True
    expected = pytest.approx(2 / blocks.sum().item())
    assert measure_disagreement(query, key, value, pack_causal_blocks(other), config) == expected
