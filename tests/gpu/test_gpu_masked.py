"""Selection under a mask on a GPU: by kernels, without waiting, in CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import masks
from helpers.models import attend_in_float64, relative_error
from torch import Tensor
from torch.nn import functional as F

from flexprefill_compile import SparsePrefillConfig
from flexprefill_compile.backend import FlexPrefillBackend
from flexprefill_compile.block_masks import masked_prefill
from flexprefill_compile.block_masks.estimators.flexprefill.masked_representative import ScoreRule
from flexprefill_compile.block_masks.layout import AttentionSizes, BlockTables, unpack_blocks
from flexprefill_compile.block_masks.masked_prefill import select_masked_prefill_blocks, select_masked_prefill_tables
from flexprefill_compile.block_masks.masks.facts import MaskFacts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LENGTH, BLOCK = 1500, 64
CONFIG = SparsePrefillConfig(gamma=0.7, min_budget=0, block_size=BLOCK)
SIZES = AttentionSizes(2, 1, LENGTH, LENGTH)
CALLS: dict[str, masks.Call] = {
    "right-padded": (masks.padded([0, 0], [1500, 1203]), SIZES, 0, False),
    "left-padded": (masks.padded([0, 301], [1500, 1500]), SIZES, 0, False),
    "packed": (masks.packed([[640, 860], [333, 1167]]), SIZES, 0, True),
    "window": (masks.window(400), AttentionSizes(1, 1, LENGTH, LENGTH), 0, False),
    "chunk": (masks.chunk(500), AttentionSizes(1, 1, 1000, LENGTH), 500, False),
}


def make_inputs(call: masks.Call, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, MaskFacts]:
    mask_mod, sizes, offset, is_packed = call
    query, key, value = (torch.randn(2, n, LENGTH, 64, device="cuda", dtype=dtype) for n in (8, 2, 2))
    facts = masks.find_facts(mask_mod, sizes, BLOCK, offset=offset, is_packed=is_packed)
    return 2 * query[:, :, : sizes.query_length], key, value, MaskFacts(*(fact.cuda() for fact in facts))


def unpack(tables: BlockTables) -> Tensor:
    width = tables.kv_indices.shape[-1]
    return unpack_blocks(*tables[:2], width) | unpack_blocks(*tables[2:], width)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_kernels_select_what_plain_pytorch_selects(
    call: masks.Call, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value, facts = make_inputs(call, torch.float32)
    rule = ScoreRule(0.125, softcap)
    expected = select_masked_prefill_blocks(query, key, value, facts, rule, CONFIG)
    monkeypatch.setattr(masked_prefill, "select_masked_prefill_blocks", None)
    tables = select_masked_prefill_tables(query, key, value, facts, rule, CONFIG)
    # Sums in another order may move a block across the threshold: a handful of thousands.
    assert (unpack(tables) != expected).sum() <= 1e-3 * expected.sum()
    assert not (unpack_blocks(*tables[2:], expected.shape[-1]) & ~facts.certain).any()
    assert not (unpack_blocks(*tables[:2], expected.shape[-1]) & facts.certain).any()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_half_types_run_by_kernels(call: masks.Call, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, facts = make_inputs(call, torch.bfloat16)
    exact = select_masked_prefill_blocks(query.float(), key.float(), None, facts, ScoreRule(0.125), CONFIG)
    monkeypatch.setattr(masked_prefill, "select_masked_prefill_blocks", None)
    actual = unpack(select_masked_prefill_tables(query, key, value, facts, ScoreRule(0.125), CONFIG))
    assert (actual != exact).sum() <= 2e-2 * exact.sum()


def test_selection_under_a_mask_never_waits_for_the_device() -> None:
    query, key, value, facts = make_inputs(CALLS["right-padded"], torch.bfloat16)
    arguments = (None, 0.125, None, *CONFIG.selection)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ops.flexprefill.select_masked_blocks(query, key, value, *facts, *arguments)  # raises if it waits
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_replayed_graph_selects_for_new_inputs_and_masks() -> None:
    static = make_inputs(CALLS["right-padded"], torch.bfloat16)
    arguments = (None, 0.125, None, *CONFIG.selection)
    select = torch.ops.flexprefill.select_masked_blocks
    select(*static[:3], *static[3], *arguments)  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = BlockTables(*select(*static[:3], *static[3], *arguments))
    for name in ("left-padded", "right-padded"):
        *inputs, facts = make_inputs(CALLS[name], torch.bfloat16)
        for kept, new in zip((*static[:3], *static[3]), (*inputs, *facts), strict=True):
            kept.copy_(new)
        graph.replay()
        expected = BlockTables(*select(*inputs, *facts, *arguments))
        assert torch.equal(unpack(replayed), unpack(expected))


def padded_attention(query: Tensor, key: Tensor, value: Tensor, is_token: Tensor) -> Tensor:
    position = torch.arange(query.shape[2], device=query.device)
    mask = (position <= position[:, None]) & is_token[:, None, None, :]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_attention_whose_floor_is_the_prompt_equals_dense(dynamic: bool) -> None:
    """Gamma below 1 lets the kernels choose; the floor makes them choose every block."""
    query, key, value, _ = make_inputs(CALLS["right-padded"], torch.float32)
    is_token = torch.arange(LENGTH, device="cuda") < torch.tensor([[1500], [1203]], device="cuda")
    options: dict[str, Any] = {"gamma": 0.5, "min_budget": 2048, "min_length": 64, "block_size": BLOCK}
    backend = FlexPrefillBackend()
    with torch.no_grad():
        compiled = torch.compile(padded_attention, backend=backend, dynamic=dynamic, options=options)
        actual = compiled(query, key, value, is_token)
    assert backend.report.num_rewritten == 1, str(backend.report)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device="cuda").tril()
    exact = attend_in_float64(query, key, value, causal & is_token[:, None, None, :])
    counts = is_token[:, None, :, None]
    assert relative_error(actual * counts, exact * counts) < 1e-3
