"""The pooled kernels under a mask against plain PyTorch: on a GPU, in Triton's interpreter elsewhere."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from helpers import masks
from helpers.inputs import random_qk
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexprefill_compile.block_masks.estimators.flexprefill.masked_representative import ScoreRule
from flexprefill_compile.block_masks.estimators.table import find_row
from flexprefill_compile.block_masks.layout import AttentionSizes, unpack_blocks
from flexprefill_compile.block_masks.masked_prefill import select_masked_prefill_blocks
from flexprefill_compile.block_masks.masks.facts import MaskFacts, describe_mask
from flexprefill_compile.block_masks.masks.intervals import BlockBounds
from flexprefill_compile.settings.config import SparsePrefillConfig

tables = pytest.importorskip("flexprefill_compile.block_masks.kernels.pooled.tables", reason="needs Triton")
masked_tables = pytest.importorskip(
    "flexprefill_compile.block_masks.kernels.pooled.masked_tables", reason="needs Triton"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or Triton's interpreter"
)
HEADS, KV_HEADS = 4, 2
PADDED: masks.Call = (masks.padded([0, 45], [223, 190]), AttentionSizes(2, 1, 223, 223), 0, False)


def sink_and_window(batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
    return (query_index >= key_index) & ((query_index - key_index < 300) | (key_index < 4))


def window_by_head(batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
    return (query_index >= key_index) & (query_index - key_index < 60 << head)


def before(batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
    return query_index > key_index


CASES: dict[str, tuple[masks.Call, int, dict[str, Any]]] = {
    "padded": (PADDED, 32, {}),
    "padded, small blocks": (PADDED, 16, {}),
    "padded, large blocks": (PADDED, 128, {}),
    "packed": ((masks.packed([[40, 160, 23], [133, 67, 23]]), AttentionSizes(2, 1, 223, 223), 0, True), 32, {}),
    "packed, both ways": (
        (masks.packed([[40, 183]], masks.everything), AttentionSizes(1, 1, 223, 223), 0, True), 32, {},
    ),
    "window": ((masks.window(100), AttentionSizes(1, 1, 333, 333), 0, False), 64, {}),
    "padded window": (
        (masks.padded([0, 45], [223, 190], masks.window(90)), AttentionSizes(2, 1, 223, 223), 0, False), 16, {},
    ),
    "chunk": ((masks.chunk(77), AttentionSizes(1, 1, 120, 233), 77, False), 32, {}),
    "window by head": ((window_by_head, AttentionSizes(1, HEADS, 223, 223), 0, False), 16, {}),
    "no valid key": ((before, AttentionSizes(1, 1, 100, 100), 0, False), 16, {}),
    "floor": (PADDED, 16, {"min_budget": 64}),
    "ceiling": (PADDED, 16, {"max_budget": 48}),
    "ceiling on what is not known": ((masks.window(50), AttentionSizes(1, 1, 223, 223), 0, False), 16, {
        "min_budget": 16, "max_budget": 32,
    }),
    "floor on what is not known": ((masks.window(100), AttentionSizes(1, 1, 223, 223), 0, False), 16, {
        "gamma": 0.3, "min_budget": 64,
    }),
    "gammas by head": (PADDED, 16, {"gamma": (0.4, 1.0, 0.9, 0.7), "min_budget": 32}),
    "last queries, padded": (PADDED, 16, {"gamma": 0.5, "dense_last": 50}),
    "last queries, packed": (
        (masks.packed([[96, 127]]), AttentionSizes(1, 1, 223, 223), 0, True), 16, {"gamma": 0.5, "dense_last": 20},
    ),
}  # fmt: skip


def make_inputs(call: masks.Call, block_size: int) -> tuple[Tensor, Tensor, Tensor, MaskFacts]:
    """Return a query (2, 4, Q, 24), key and value (2, 2, K, 24), float32, and the facts."""
    mask_mod, sizes, offset, is_packed = call
    query, key = random_qk(1, 2, HEADS, KV_HEADS, sizes.key_length, 24, spread=2, dtype=torch.float32)
    facts = masks.find_facts(mask_mod, sizes, block_size, offset=offset, is_packed=is_packed)
    query, key, value = (x.to(DEVICE) for x in (query[:, :, : sizes.query_length], key, torch.randn_like(key)))
    return query, key, value, MaskFacts(*(fact.to(DEVICE) for fact in facts))


def create_config(block_size: int, **settings: Any) -> SparsePrefillConfig:
    return SparsePrefillConfig(
        **({"estimator": "pooled", "gamma": 0.8, "min_budget": 0, "block_size": block_size} | settings)
    )


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    facts: MaskFacts,
    config: SparsePrefillConfig,
    softcap: float | None = None,
    tile: Any = None,
) -> Tensor:
    """Compare the kernels' tables with plain PyTorch's selection, and return it."""
    scale = query.shape[-1] ** -0.5
    expected = select_masked_prefill_blocks(query, key, value, facts, ScoreRule(scale, softcap), config)
    packed = masked_tables.select_masked_tables(query, key, value, facts, scale, softcap, config, tile)
    for counts, indices, kind in [(*packed[:2], ~facts.certain), (*packed[2:], facts.certain)]:
        assert torch.equal(unpack_blocks(counts, indices, expected.shape[-1]), expected & kind)
        is_used = torch.arange(indices.shape[-1], device=DEVICE) < counts.unsqueeze(-1)
        assert (indices.diff(dim=-1) > 0)[is_used[..., 1:]].all()
        assert (indices[..., 0] < expected.shape[-1]).all(), "FlexAttention reads it even where the count is 0"
    return expected


@pytest.mark.parametrize(("call", "block_size", "settings"), CASES.values(), ids=CASES)
def test_the_kernels_select_what_plain_pytorch_selects(
    call: masks.Call, block_size: int, settings: dict[str, Any]
) -> None:
    check(*make_inputs(call, block_size), create_config(block_size, **settings))


@settings(deadline=None, max_examples=12)
@given(seed=masks.seeds, call=masks.calls(), config=masks.configs(), heads=st.sampled_from([(5, 1), (4, 2), (3, 3)]))
def test_any_mask(seed: int, call: masks.Call, config: SparsePrefillConfig, heads: tuple[int, int]) -> None:
    mask_mod, sizes, offset, is_packed = call
    query, key = random_qk(seed, sizes.batch, *heads, sizes.key_length, 16, spread=2, dtype=torch.float32)
    facts = masks.find_facts(mask_mod, sizes, masks.BLOCK, offset=offset, is_packed=is_packed)
    facts = MaskFacts(*(fact.to(DEVICE) for fact in facts))
    query, key = query[:, :, : sizes.query_length].to(DEVICE), key.to(DEVICE)
    pooled = create_config(masks.BLOCK, gamma=config.gamma, min_budget=config.min_budget, max_budget=config.max_budget)
    check(query, key, None, facts, pooled)


def test_a_softcap_is_applied() -> None:
    query, key, value, facts = make_inputs(PADDED, 16)
    config = create_config(16)
    capped = check(query, key, value, facts, config, softcap=1.0)
    assert not torch.equal(capped, check(query, key, value, facts, config))


def test_small_tiles_leave_out_a_gap() -> None:
    """The sink lies in the first of many tiles, the window in the last ones."""
    call: masks.Call = (sink_and_window, AttentionSizes(1, 1, 1500, 1500), 0, False)
    query, key, value, facts = make_inputs(call, 32)
    one = (query[:1, :1], key[:1, :1], value[:1, :1])
    check(*one, facts, create_config(32), tile=tables.Tile(16, 16, 4, 2, 64))


@pytest.mark.parametrize(
    ("mask_mod", "length"), [(masks.padded([20], [480]), 500), (masks.everything, 500), (masks.causal, 777)]
)
def test_tiles_of_which_every_row_sees_all(mask_mod: masks.MaskMod, length: int) -> None:
    """Also where some of their keys don't count: ``everything`` sees all of the last block, and it is ragged."""
    query, key, value, facts = make_inputs((mask_mod, AttentionSizes(1, 1, length, length), 0, False), 16)
    one = (query[:1, :2], key[:1, :1], value[:1, :1])
    check(*one, facts, create_config(16), tile=tables.Tile(16, 16, 4, 2, 64))


def test_blocks_that_only_the_mask_knows_are_all_taken() -> None:
    query, key, value, exact = make_inputs(PADDED, 16)
    causal = torch.ones_like(exact.possible).tril()
    mask_mod, sizes, *_ = PADDED
    loose = BlockBounds(torch.zeros_like(causal).cpu(), causal.cpu())
    facts = MaskFacts(*(fact.to(DEVICE) for fact in describe_mask(mask_mod, (), sizes, loose, 0, False, 16)))
    selected = check(query, key, value, facts, create_config(16, min_budget=32))
    counts = facts.query_counts.any(-1)[:, None, :, None] & facts.key_counts.any(-1)[:, None, None]
    assert (selected | ~(counts & causal)).all()


def test_layouts_of_facts_and_inputs_don_t_matter() -> None:
    query, key, value, facts = make_inputs(PADDED, 16)
    grids = ("certain", "possible", "required")
    spread = {name: getattr(facts, name).expand(-1, HEADS, -1, -1).mT.contiguous().mT for name in grids}
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    check(*views, facts._replace(**spread), create_config(16))


def test_offsets_of_one_signature_don_t_get_mixed_up() -> None:
    for offset in (64, 77, 96):
        call: masks.Call = (masks.chunk(offset), AttentionSizes(1, 1, 100, 200), offset, False)
        check(*make_inputs(call, 16), create_config(16))


def test_half_precision_selects_as_its_rounded_means_say() -> None:
    """Means are kept in the dtype of the keys: few blocks lie so near a threshold that it matters."""
    query, key, value, facts = make_inputs(PADDED, 16)
    query, key, value = (x.half() for x in (query, key, value))
    config = create_config(16)
    expected = select_masked_prefill_blocks(query, key, value, facts, ScoreRule(0.2), config)
    packed = masked_tables.select_masked_tables(query, key, value, facts, 0.2, None, config)
    num_blocks = expected.shape[-1]
    actual = unpack_blocks(*packed[:2], num_blocks) | unpack_blocks(*packed[2:], num_blocks)
    assert (actual != expected).sum() <= 0.02 * expected.sum()


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize(("place", "position"), [("key", 100), ("key", 210), ("value", 100), ("value", 10)])
def test_heads_of_keys_or_values_that_are_not_finite_compute_every_possible_block(
    place: str, position: int, number: float
) -> None:
    """In padding too; whatever the ceiling."""
    query, key, value, facts = make_inputs(PADDED, 32)
    (key if place == "key" else value)[1, 0, position, 3] = number
    selected = check(query, key, value, facts, create_config(32, max_budget=32))
    assert torch.equal(selected[1, :2], facts.possible[1].expand(2, -1, -1))
    assert not torch.equal(selected[1, 2:], facts.possible[1].expand(2, -1, -1))


def test_a_query_that_is_not_finite_fills_its_own_row() -> None:
    query, key, _, facts = make_inputs(PADDED, 16)
    config = create_config(16)

    def select() -> Tensor:
        packed = masked_tables.select_masked_tables(query, key, None, facts, 0.2, None, config)
        num_blocks = facts.possible.shape[-1]
        return unpack_blocks(*packed[:2], num_blocks) | unpack_blocks(*packed[2:], num_blocks)

    clean = select()
    query[0, 0, 196] = torch.nan  # the middle of its eight queries
    actual = select()
    assert torch.equal(actual[0, 0, 12], facts.possible[0, 0, 12])
    others = torch.arange(14, device=DEVICE) != 12
    assert torch.equal(actual[0, 0, others], clean[0, 0, others])
    assert torch.equal(actual[0, 1:], clean[0, 1:])


def test_inputs_that_the_kernels_don_t_take_are_left_to_plain_pytorch() -> None:
    query, key, _, facts = make_inputs(PADDED, 16)
    select = find_row(create_config(16)).select_masked_by_kernels
    assert select is not None
    assert select(query.double(), key.double(), None, facts, 0.2, None, create_config(16)) is None
    assert select(query, key, None, facts, 0.2, None, create_config(16, gamma=1.0)) is None
    wide = torch.zeros(1, 1, 223, 320)
    assert select(wide, wide, None, facts, 0.2, None, create_config(16)) is None
