"""The op ``select_masked_blocks`` as a graph sees it."""

from __future__ import annotations

import pytest
import torch
from helpers import masks
from helpers.inputs import CountOps, RecordSizes, paper_config, random_qk
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flexprefill_compile.block_masks import record_densities
from flexprefill_compile.block_masks.attention_inputs import SCORES_AT_ONCE
from flexprefill_compile.block_masks.estimators.flexprefill.masked_representative import ScoreRule
from flexprefill_compile.block_masks.layout import AttentionSizes
from flexprefill_compile.block_masks.masked_prefill import select_masked_prefill_blocks
from flexprefill_compile.block_masks.masks.facts import MaskFacts

BLOCK = 16
SELECT = torch.ops.flexprefill.select_masked_blocks.default
CALLS = {
    "padded": (masks.padded([0, 16], [177, 190]), AttentionSizes(2, 1, 200, 200), 0, False),
    "packed": (masks.packed([[40, 160], [133, 67]]), AttentionSizes(2, 1, 200, 200), 0, True),
    "chunk": (masks.chunk(37), AttentionSizes(1, 1, 160, 210), 37, False),
    "by head": (
        lambda batch, head, query_index, key_index: (query_index >= key_index) & (query_index - key_index < 60 << head),
        AttentionSizes(1, 4, 200, 200), 0, False,
    ),
}  # fmt: skip


def make_arguments(call: masks.Call, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, MaskFacts]:
    """Return a query (2, 4, Q, 8), a key (2, 2, K, 8) and the facts."""
    mask_mod, sizes, offset, is_packed = call
    query, key = random_qk(0, 2, 4, 2, sizes.key_length, 8, dtype=dtype)
    facts = masks.find_facts(mask_mod, sizes, BLOCK, offset=offset, is_packed=is_packed)
    return query[:, :, : sizes.query_length], key, facts


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("softcap", "biased"), [(None, False), (5.0, False), (None, True)])
def test_op_passes_opcheck(call: masks.Call, softcap: float | None, biased: bool) -> None:
    """Among others: its fake has the shapes and strides of its results, with static and with dynamic sizes."""
    query, key, facts = make_arguments(call)
    bias = torch.randn(facts.row_mask.shape) if biased else None
    for gamma, max_budget, value in [(0.8, None, key), (0.8, 32, None), (1.0, None, key)]:
        torch.library.opcheck(
            SELECT,
            (query, key, value, *facts, bias, 0.3, softcap, [gamma], 0.1, 16, max_budget, BLOCK, 0, "flexprefill"),
        )


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_hold_the_selection_and_tell_full_blocks_apart(call: masks.Call, dtype: torch.dtype) -> None:
    query, key, facts = make_arguments(call, dtype)
    config = paper_config(gamma=0.5, min_budget=0, block_size=BLOCK)
    selected = select_masked_prefill_blocks(query, key, None, facts, ScoreRule(0.3, 5.0), config)
    with record_densities() as densities:
        tables = SELECT(query, key, None, *facts, None, 0.3, 5.0, [0.5], 0.1, 0, None, BLOCK, 0, "flexprefill")
    for counts, indices, expected in [(*tables[:2], ~facts.certain), (*tables[2:], facts.certain)]:
        assert counts.dtype == indices.dtype == torch.int32
        is_used = torch.arange(indices.shape[-1]) < counts.unsqueeze(-1)
        listed = torch.zeros_like(selected).scatter_(-1, indices.long(), is_used)
        assert torch.equal(listed, selected & expected)
    expected_density = selected.sum((-2, -1)) / facts.possible.sum((-2, -1))
    torch.testing.assert_close(densities, [expected_density])
    assert (expected_density < 1).all()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_no_shape_depends_on_data(call: masks.Call) -> None:
    query, key, facts = make_arguments(call)
    config = paper_config(min_budget=32, max_budget=64, block_size=BLOCK)
    shape = (*query.shape[:2], *facts.possible.shape[-2:])
    with FakeTensorMode() as mode:
        fake_query, fake_key, *fake_facts = (mode.from_tensor(x) for x in (query, key, *facts))
        rule = ScoreRule(0.3)
        fake = select_masked_prefill_blocks(fake_query, fake_key, fake_key, MaskFacts(*fake_facts), rule, config)
        assert fake.shape == shape


@pytest.mark.parametrize("is_packed", [False, True])
def test_no_host_sync_and_no_loop_over_heads_or_prompts(is_packed: bool) -> None:
    config = paper_config(min_budget=32, max_budget=64, block_size=BLOCK)
    counts = []
    for batch, heads, kv_heads in [(2, 4, 2), (3, 16, 4), (5, 4, 1)]:
        query, key = random_qk(0, batch, heads, kv_heads, 200, 16, dtype=torch.float32)
        mask = masks.packed([[60, 140]] * batch)
        sizes = AttentionSizes(batch, 1, 200, 200)
        with CountOps() as ops:
            facts = masks.find_facts(mask, sizes, BLOCK, is_packed=is_packed)
            select_masked_prefill_blocks(query, key, key, facts, ScoreRule(0.25), config)
        counts.append(ops.counts)
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_no_tensor_is_larger_than_the_documented_bound(tau: float, is_packed: bool) -> None:
    heads, length, block_size = 4, 4096, 128
    query, key = random_qk(0, 1, heads, 2, length, 32, dtype=torch.bfloat16)
    sizes = AttentionSizes(1, 1, length, length)
    facts = masks.find_facts(masks.packed([[1000, 3096]]), sizes, block_size, is_packed=is_packed)
    config = paper_config(tau=tau, min_budget=256, max_budget=1024, block_size=block_size)
    with RecordSizes() as recorded:
        select_masked_prefill_blocks(query, key, key, facts, ScoreRule(32**-0.5), config)
    # A chunk of scores, and as many zeros beside it, in which its diagonals are sheared straight.
    assert heads * block_size * length > 2 * SCORES_AT_ONCE["cpu"] - 1, "the scenario: the scores don't fit at once"
    assert recorded.largest <= 2 * SCORES_AT_ONCE["cpu"]


def test_scale_of_the_op_is_that_of_the_scores() -> None:
    query, key, facts = make_arguments(CALLS["padded"])

    def select(query: Tensor, scale: float) -> list[Tensor]:
        return list(SELECT(query, key, None, *facts, None, scale, None, [0.5], 0.1, 0, None, BLOCK, 0, "flexprefill"))

    twice, scaled, plain = select(query, 2.0), select(8 * query, 0.25), select(query, 0.25)
    assert all(torch.equal(left, right) for left, right in zip(twice, scaled, strict=True))
    assert not all(torch.equal(left, right) for left, right in zip(plain, scaled, strict=True))
