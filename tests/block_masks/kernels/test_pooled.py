"""The kernels of the pooled estimator against plain PyTorch: on a GPU, in Triton's interpreter elsewhere."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from helpers.inputs import random_qk

from flexprefill_compile.block_masks.layout import BlockTables, count_blocks, unpack_blocks
from flexprefill_compile.block_masks.prefill import select_prefill_blocks
from flexprefill_compile.settings.config import SparsePrefillConfig

tables = pytest.importorskip("flexprefill_compile.block_masks.kernels.pooled.tables", reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or Triton's interpreter"
)


def create_inputs(
    batch: int, heads: int, kv_heads: int, length: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key = random_qk(1, batch, heads, kv_heads, length, head_dim, spread=2, dtype=dtype)
    return query.to(DEVICE), key.to(DEVICE), torch.randn_like(key).to(DEVICE)


def create_config(block_size: int, **settings: Any) -> SparsePrefillConfig:
    return SparsePrefillConfig(
        **({"estimator": "pooled", "gamma": 0.8, "min_budget": 0, "block_size": block_size} | settings)
    )


def select(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None, config: SparsePrefillConfig, tile: Any = None
) -> torch.Tensor:
    num_blocks = count_blocks(query.shape[2], config.block_size)
    ceiling = config.max_budget
    width = num_blocks if ceiling is None else min(num_blocks, ceiling // config.block_size + 1)
    packed = tables.select_tables(query, key, value, query.shape[-1] ** -0.5, config, width, tile)
    return unpack(packed, num_blocks)


def unpack(packed: BlockTables, num_blocks: int) -> torch.Tensor:
    return unpack_blocks(*packed[:2], num_blocks) | unpack_blocks(*packed[2:], num_blocks)


def expect(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None, config: SparsePrefillConfig
) -> torch.Tensor:
    return select_prefill_blocks(query, key, value, query.shape[-1] ** -0.5, config)


@pytest.mark.parametrize(
    ("shape", "block_size", "settings"),
    [
        ((1, 4, 2, 300, 24), 32, {}),
        ((2, 6, 2, 517, 16), 64, {}),
        ((1, 3, 3, 137, 80), 16, {}),
        ((1, 3, 1, 700, 16), 128, {"min_budget": 128}),
        ((1, 1, 1, 1, 16), 16, {}),
        ((1, 2, 1, 1500, 16), 512, {}),
        ((1, 12, 2, 260, 16), 32, {"min_budget": None}),
        ((1, 4, 2, 400, 24), 32, {"max_budget": 64}),
        ((1, 4, 2, 400, 24), 32, {"gamma": 1.0, "max_budget": 64}),
        ((1, 4, 2, 400, 24), 32, {"gamma": (0.4, 1.0, 0.9, 0.7), "dense_last": 50, "min_budget": 64}),
    ],
    ids=str,
)
def test_the_kernels_select_what_plain_pytorch_selects(
    shape: tuple[int, ...], block_size: int, settings: dict[str, Any]
) -> None:
    query, key, value = create_inputs(*shape)
    config = create_config(block_size, **settings)
    expected = expect(query, key, value, config)
    assert torch.equal(select(query, key, value, config), expected)
    assert torch.equal(select(query, key, None, config), expected)


def test_small_tiles_select_the_same() -> None:
    query, key, value = create_inputs(1, 3, 1, 700, 16)
    config = create_config(128)
    actual = select(query, key, value, config, tables.Tile(32, 16, 4, 2, 64))
    assert torch.equal(actual, expect(query, key, value, config))


def test_half_precision_selects_as_its_rounded_means_say() -> None:
    """Means are kept in the dtype of the keys: few blocks lie so near a threshold that it matters."""
    query, key, value = create_inputs(1, 4, 2, 512, 32, torch.float16)
    config = create_config(32)
    actual, expected = select(query, key, value, config), expect(query, key, value, config)
    assert (actual != expected).sum() <= 0.01 * expected.sum()


def test_strides_don_t_matter() -> None:
    query, key, value = create_inputs(1, 4, 2, 300, 24)
    config = create_config(32)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    assert torch.equal(select(*views, config), select(query, key, value, config))


@pytest.mark.parametrize("block_size", [16, 64])
def test_query_blocks_that_take_turns_in_a_buffer_select_the_same(
    block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value = create_inputs(2, 6, 2, 700, 16)
    config = create_config(block_size, max_budget=4 * block_size)
    monkeypatch.setattr(tables, "MOST_MASSES", 0)
    tables._recall_plan.cache_clear()
    assert torch.equal(select(query, key, value, config), expect(query, key, value, config))
    tables._recall_plan.cache_clear()


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", ["key", "value"])
def test_heads_of_keys_or_values_that_are_not_finite_compute_every_block(place: str, number: float) -> None:
    query, key, value = create_inputs(1, 4, 2, 300, 24)
    (key if place == "key" else value)[0, 1, 200, 3] = number
    config = create_config(32)
    actual = select(query, key, value, config)
    causal = torch.ones_like(actual[0, 0]).tril()
    assert torch.equal(actual[0, 2:], causal.expand(2, -1, -1))
    assert torch.equal(actual[0, :2], expect(query, key, value, config)[0, :2])


def test_a_query_that_is_not_finite_fills_its_own_row() -> None:
    query, key, value = create_inputs(1, 2, 1, 320, 24)
    query[0, 0, 196] = torch.nan  # the middle of its eight queries
    config = create_config(32)
    actual = select(query, key, value, config)
    assert actual[0, 0, 6, :7].all()
    query[0, 0, 196] = 0
    clean = select(query, key, value, config)
    others = torch.arange(10, device=DEVICE) != 6
    assert torch.equal(actual[0, 0, others], clean[0, 0, others])


def test_the_same_inputs_give_the_same_tables_twice() -> None:
    query, key, value = create_inputs(2, 4, 2, 300, 24)
    config = create_config(32)
    assert torch.equal(select(query, key, value, config), select(query, key, value, config))


def test_inputs_that_the_kernels_don_t_take_are_left_to_plain_pytorch() -> None:
    query, key, value = create_inputs(1, 2, 1, 64, 16, torch.float64)
    assert tables.try_select(query, key, value, 1.0, create_config(16), 4) is None
    wide, wide_key, _ = create_inputs(1, 2, 1, 64, 320)
    assert tables.try_select(wide, wide_key, None, 1.0, create_config(16), 4) is None
