"""The kernels against plain PyTorch: on a GPU where there is one, in Triton's interpreter elsewhere."""

from __future__ import annotations

import importlib
import math
import os

import pytest
import torch
from helpers.inputs import paper_config, random_qk, structured_qk
from torch import Tensor

from flexprefill_compile.block_masks.layout import count_blocks
from flexprefill_compile.block_masks.prefill import select_prefill_blocks
from flexprefill_compile.block_masks.select import select_cumulative
from flexprefill_compile.settings.config import SparsePrefillConfig

triton_kernels = pytest.importorskip(
    "flexprefill_compile.block_masks.kernels.flexprefill.select", reason="needs Triton"
)
map_thresholds, patterns = (
    importlib.import_module(f"flexprefill_compile.block_masks.kernels.flexprefill.{name}")
    for name in ("find_map_thresholds", "choose_patterns")
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies the bits of bfloat16 numbers as if they were integers.
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or Triton's interpreter"
)


def select_by_kernels(
    query: Tensor, key: Tensor, value: Tensor | None, scale: float, config: SparsePrefillConfig, width: int
) -> Tensor:
    """Return the blocks of the tables, (B, H, N, N) bool, after checking the tables themselves."""
    tables = triton_kernels.select_tables(query, key, value, scale, config, width)
    num_blocks = tables.kv_num_blocks.shape[-1]
    assert all(table.dtype == torch.int32 for table in tables)
    assert tables.kv_indices.shape[-1] == tables.full_kv_indices.shape[-1] == width
    assert tables.kv_num_blocks.eq(1).all(), "one diagonal block a row"
    assert tables.kv_indices[..., 0].eq(torch.arange(num_blocks, device=query.device)).all()
    is_used = torch.arange(width, device=query.device) < tables.full_kv_num_blocks.unsqueeze(-1)
    columns = tables.full_kv_indices.masked_fill(~is_used, num_blocks)
    assert (columns[..., 1:] > columns[..., :-1]).logical_or(~is_used[..., 1:]).all(), "in ascending order"
    grid = torch.zeros(*columns.shape[:-1], num_blocks + 1, dtype=torch.bool, device=query.device)
    grid.scatter_(-1, columns.long(), True)
    return grid[..., :num_blocks] | torch.eye(num_blocks, dtype=torch.bool, device=query.device)


def assert_same_blocks(
    query: Tensor, key: Tensor, value: Tensor | None, config: SparsePrefillConfig, width: int | None = None
) -> Tensor:
    query, key = query.to(DEVICE), key.to(DEVICE)
    value = None if value is None else value.to(DEVICE)
    scale = query.shape[-1] ** -0.5
    width = width or count_blocks(query.shape[-2], config.block_size)
    selected = select_by_kernels(query, key, value, scale, config, width)
    assert torch.equal(selected, select_prefill_blocks(query, key, value, scale, config))
    return selected


@pytest.mark.parametrize("tau", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "length", "head_dim", "block_size", "dtype"),
    [
        (1, 4, 2, 256, 32, 16, torch.float32),
        (2, 2, 1, 200, 20, 32, HALF),
        (1, 3, 3, 100, 45, 16, torch.float16),
        (1, 2, 1, 129, 16, 64, torch.float32),
        (1, 2, 2, 5, 16, 16, torch.float32),
        (1, 1, 1, 1, 16, 16, torch.float32),
    ],
)
def test_kernels_select_what_plain_pytorch_selects(
    batch: int, heads: int, kv_heads: int, length: int, head_dim: int, block_size: int, dtype: torch.dtype, tau: float
) -> None:
    query, key = structured_qk(0, batch, heads, kv_heads, length, head_dim, block_size=block_size, dtype=torch.float32)
    config = paper_config(gamma=0.9, tau=tau, min_budget=0, block_size=block_size)
    assert_same_blocks(query.to(dtype), key.to(dtype), None, config)


@pytest.mark.parametrize(("gamma", "max_budget"), [(0.8, 64), (1.0, 64), (1.0, None)])
def test_budgets_and_narrow_tables(gamma: float, max_budget: int | None) -> None:
    query, key = random_qk(1, 1, 4, 2, 200, 16, spread=3, dtype=torch.float32)
    config = paper_config(gamma=gamma, min_budget=32, max_budget=max_budget, block_size=16)
    width = 13 if max_budget is None else max_budget // 16 + 1
    assert_same_blocks(query, key, key, config, width)


def test_inputs_of_any_strides() -> None:
    query, key = random_qk(2, 2, 2, 1, 100, 24, spread=3, dtype=torch.float32)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    key = key.mT.contiguous().mT  # the features lie far apart
    value = torch.randn(1, 1, 100, 40).expand(2, -1, -1, -1)
    assert_same_blocks(query, key, value, paper_config(gamma=0.7, min_budget=0, block_size=16))


def test_large_maps_are_searched_by_several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "MOST_BLOCKS_HELD", 4)
    monkeypatch.setattr(triton_kernels, "MAPS_AT_ONCE_BYTES", 1)  # one head at a time
    config = paper_config(gamma=0.8, tau=1, min_budget=0, block_size=16)
    selected = assert_same_blocks(*random_qk(3, 1, 2, 1, 150, 16, spread=4, dtype=torch.float32), None, config)
    assert selected.sum() < 0.9 * 2 * 55, "the scenario: not every block is needed"


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("max_budget", [None, 32])
@pytest.mark.parametrize("poisoned", [0, 1, 2])
def test_heads_that_are_not_finite(poison: float, max_budget: int | None, poisoned: int) -> None:
    query, key = random_qk(4, 1, 4, 2, 100, 16, spread=4, dtype=torch.float32)
    tensors = [query, key, torch.randn(1, 2, 100, 16)]
    tensors[poisoned][0, 1, 70, 3] = poison
    config = paper_config(gamma=0.5, tau=0.3, min_budget=0, max_budget=max_budget, block_size=16)
    selected = assert_same_blocks(tensors[0], tensors[1], tensors[2], config)
    if poisoned > 0:  # the last row reads the block in question, whatever the ceiling
        assert selected[0, 2:, -1, 70 // 16].all()


@pytest.mark.parametrize(("tau", "most_blocks_held", "max_budget"), [(0.0, 128, None), (1.0, 128, 64), (1.0, 0, None)])
def test_each_head_has_its_own_gamma_and_the_last_rows_are_dense(
    monkeypatch: pytest.MonkeyPatch, tau: float, most_blocks_held: int, max_budget: int | None
) -> None:
    monkeypatch.setattr(triton_kernels, "MOST_BLOCKS_HELD", most_blocks_held)
    query, key = structured_qk(0, 1, 4, 2, 100, 16, block_size=16, dtype=torch.float32)
    gammas = (0.4, 1.0, 0.9, 0.7)
    config = paper_config(gamma=gammas, tau=tau, min_budget=0, max_budget=max_budget, block_size=16, dense_last=20)
    selected = assert_same_blocks(query, key, None, config)
    if max_budget is None:
        assert torch.equal(selected[:, 1], torch.ones_like(selected[:, 1]).tril())
        assert selected[..., -2, :-1].all()
        assert not selected[:, 0].logical_or(~torch.ones_like(selected[:, 0]).tril()).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("largest", [1, 3, 50])
@pytest.mark.parametrize("num_blocks", [1, 2, 7, 24])
def test_thresholds_of_exact_masses_reach_gamma_with_the_fewest_entries(
    seed: int, largest: int, num_blocks: int
) -> None:
    """Whole numbers over a power of two and a gamma of few bits: no rounding anywhere, ties in plenty."""
    generator = torch.Generator().manual_seed(seed)
    mass = torch.randint(1, largest + 1, (num_blocks, num_blocks), generator=generator).tril().float() / 2**16
    gamma = [0.125, 0.5, 0.75, 0.890625, 0.984375][seed]
    mass = mass.to(DEVICE)
    threshold, last_tie = torch.empty(2, device=DEVICE), torch.empty(2, dtype=torch.int32, device=DEVICE)
    pattern = torch.full((1,), patterns.QUERY_AWARE.value, dtype=torch.int32, device=DEVICE)
    sizes = {"ROWS": 16, "COLUMNS": 32, "HAS_GAMMAS": False}
    map_thresholds.find_map_thresholds[(1,)](
        mass, pattern, threshold, last_tie, mass, gamma, 0, num_blocks, 1, **sizes, num_warps=4
    )
    place = torch.arange(num_blocks**2, device=DEVICE).view_as(mass)
    selected = (mass > threshold[0]) | ((mass == threshold[0]) & (place <= last_tie[0]))
    assert torch.equal(selected & (mass > 0), select_cumulative(mass.flatten(), gamma).view_as(mass) & (mass > 0))


def test_what_the_kernels_do_not_take_is_left_to_plain_pytorch() -> None:
    config = paper_config(block_size=16)
    query, key = random_qk(5, 1, 1, 1, 64, 16)
    assert triton_kernels.try_select(query, key, None, 0.25, config, 4) is None, "float64"
    wide = torch.zeros(1, 1, 64, 512)
    assert triton_kernels.try_select(wide, wide, None, 0.25, config, 4) is None, "a head too wide"
