"""The kernels of the scoring estimators against plain PyTorch: on a GPU, in Triton's interpreter elsewhere."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.inputs import random_qk
from torch import Tensor

from flexprefill_compile.block_masks.estimators import inputs as estimator_inputs
from flexprefill_compile.block_masks.estimators import xattention
from flexprefill_compile.block_masks.estimators.inputs import EstimatorInputs
from flexprefill_compile.block_masks.estimators.table import ESTIMATORS
from flexprefill_compile.block_masks.estimators.xattention import score_antidiagonals
from flexprefill_compile.block_masks.layout import count_blocks, create_causal_grid, unpack_blocks
from flexprefill_compile.block_masks.prefill import select_prefill_blocks
from flexprefill_compile.settings.config import SparsePrefillConfig

triton_shares = pytest.importorskip(
    "flexprefill_compile.block_masks.kernels.block_shares.shares", reason="needs Triton"
)
triton_kernels = pytest.importorskip(
    "flexprefill_compile.block_masks.kernels.flexprefill.select", reason="needs Triton"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or Triton's interpreter"
)
PLAIN: dict[str, Callable[[EstimatorInputs, int], Tensor]] = {
    "share_rows": EstimatorInputs.share_of_rows,
    "share_antidiagonals": score_antidiagonals,
}
KINDS = [("share_rows", 4), ("share_rows", 16), ("share_antidiagonals", 16), ("share_antidiagonals", 8)]
SHAPES = [(1, 4, 2, 96, 24, 32), (2, 2, 1, 77, 64, 16), (1, 3, 3, 37, 80, 16), (1, 1, 1, 1, 16, 16)]


def make_inputs(query: Tensor, key: Tensor, block_size: int) -> EstimatorInputs:
    grid = create_causal_grid(count_blocks(query.shape[2], block_size), query.device)
    return EstimatorInputs(query, key, query.shape[-1] ** -0.5, block_size, grid[None, None])


def share(name: str, inputs: EstimatorInputs, number: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Return the shares from kernels, and those from float64 and plain PyTorch."""
    actual = getattr(triton_shares, name)(inputs, number)
    exact = dataclasses.replace(inputs, query=inputs.query.double(), key=inputs.key.double())
    with monkeypatch.context() as patched:
        patched.setattr(estimator_inputs, "share_rows", lambda *_: None)
        patched.setattr(xattention, "share_antidiagonals", lambda *_: None)
        return actual, PLAIN[name](exact, number)


@pytest.mark.parametrize(("name", "number"), KINDS)
@pytest.mark.parametrize(("batch", "heads", "kv_heads", "length", "head_dim", "block_size"), SHAPES)
def test_shares_are_those_of_plain_pytorch(
    name: str,
    number: int,
    batch: int,
    heads: int,
    kv_heads: int,
    length: int,
    head_dim: int,
    block_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query, key = random_qk(1, batch, heads, kv_heads, length, head_dim, spread=2, dtype=torch.float32)
    actual, expected = share(name, make_inputs(query.to(DEVICE), key.to(DEVICE), block_size), number, monkeypatch)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    assert not actual.triu(1).any()


@pytest.mark.parametrize(("name", "number"), KINDS[1:])
def test_half_types_and_any_strides(name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = random_qk(2, 1, 4, 2, 75, 24, spread=2, dtype=torch.float16)
    query = query.transpose(1, 2).contiguous().transpose(1, 2).to(DEVICE)
    key = key.mT.contiguous().mT.to(DEVICE)
    actual, expected = share(name, make_inputs(query, key, 16), number, monkeypatch)
    # Pooled vectors are rounded: an error of eps / 2 of each product, of both factors, moves a score, and so the log of
    # a share, by less than eps times the sum of magnitudes.
    norms = query.double().norm(dim=-1).max() * key.double().norm(dim=-1).max()
    allowed = 2 * torch.finfo(torch.float16).eps * norms.item() * 24**-0.5
    torch.testing.assert_close(actual.double(), expected, rtol=allowed, atol=1e-6)


@pytest.mark.parametrize(("name", "number"), KINDS[1:])
def test_few_query_blocks_at_a_time_and_blocks_larger_than_a_tile(
    name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key = random_qk(3, 1, 2, 1, 150, 16, spread=2, dtype=torch.float32)
    inputs = make_inputs(query.to(DEVICE), key.to(DEVICE), 32)
    monkeypatch.setattr(triton_shares, "MASSES_AT_ONCE_BYTES", 1)
    monkeypatch.setattr(triton_shares, "choose_tiles", lambda *_: iter([triton_shares.Tiles(16, 16, 16, 4, 1)]))
    actual, expected = share(name, inputs, number, monkeypatch)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"gamma": 0.9},
        {"gamma": (0.4, 1.0, 0.9, 0.7), "dense_last": 20, "min_budget": 32},
        {"gamma": 0.95, "max_budget": 32},
        {"gamma": 1.0, "max_budget": 32},
    ],
)
@pytest.mark.parametrize("poison", [None, math.nan])
def test_tables_are_those_of_plain_pytorch(settings: dict[str, Any], poison: float | None) -> None:
    query, key = (x.to(DEVICE) for x in random_qk(4, 1, 4, 2, 150, 16, spread=3, dtype=torch.float32))
    value = torch.randn(1, 2, 150, 16).to(DEVICE)
    if poison is not None:
        value[0, 1, 70, 3] = poison
    config = SparsePrefillConfig(**({"min_budget": 0, "block_size": 16, "estimator": "sampled"} | settings))
    inputs = make_inputs(query, key, 16)
    score = ESTIMATORS["sampled"].score
    assert score is not None
    tables = triton_kernels.select_scored_tables(query, key, value, score(inputs), config, 10)
    selected = unpack_blocks(*tables[:2], 10) | unpack_blocks(*tables[2:], 10)
    expected = select_prefill_blocks(query, key, value, inputs.scale, config)
    assert torch.equal(selected, expected)
    if poison is None and config.gammas == (0.9,):
        assert expected.sum() < 0.9 * torch.ones_like(expected).tril().sum(), "the scenario: not every block is needed"


def test_rows_reach_gamma_with_the_fewest_entries_where_many_are_equal() -> None:
    """Whole numbers over a power of two and a gamma of few bits: no rounding anywhere, ties in plenty."""
    scores = torch.randint(0, 4, (1, 2, 12, 12)).float().div(64).tril().to(DEVICE)
    query, key = (x.to(DEVICE) for x in random_qk(5, 1, 2, 1, 190, 16, dtype=torch.float32))
    config = SparsePrefillConfig(gamma=0.75, min_budget=0, block_size=16, estimator="xattention")
    tables = triton_kernels.select_scored_tables(query, key, None, scores, config, 12)
    selected = unpack_blocks(*tables[:2], 12) | unpack_blocks(*tables[2:], 12)
    ordered, order = scores.double().sort(dim=-1, descending=True, stable=True)
    wanted = ordered.cumsum(-1) - ordered < 0.75 * ordered.sum(-1, keepdim=True)
    expected = torch.zeros_like(selected).scatter_(-1, order, wanted) | torch.eye(12, device=DEVICE).bool()
    expected[..., 0] = True
    assert torch.equal(selected, expected)


def test_what_the_kernels_do_not_take_is_left_to_plain_pytorch() -> None:
    inputs = make_inputs(*random_qk(6, 1, 1, 1, 64, 16, dtype=torch.float32), 16)
    assert triton_shares.can_share(inputs)
    assert not triton_shares.can_share(dataclasses.replace(inputs, softcap=30.0))
    assert not triton_shares.can_share(dataclasses.replace(inputs, query=inputs.query.double()))
