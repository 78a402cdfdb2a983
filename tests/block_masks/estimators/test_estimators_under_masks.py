"""What every estimator keeps to under a mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import masks
from helpers.inputs import random_qk
from helpers.scores import SCORES

from flexprefill_compile.block_masks.estimators.flexprefill.masked_representative import ScoreRule
from flexprefill_compile.block_masks.estimators.inputs import EstimatorInputs
from flexprefill_compile.block_masks.estimators.table import ESTIMATORS
from flexprefill_compile.block_masks.layout import AttentionSizes, count_blocks
from flexprefill_compile.block_masks.masked_prefill import select_masked_prefill_blocks
from flexprefill_compile.block_masks.prefill import select_prefill_blocks
from flexprefill_compile.settings.config import SparsePrefillConfig

BLOCK = 32
SCALE = 0.25
BUILT_IN = list(ESTIMATORS)
NEW = [name for name in BUILT_IN if name != "flexprefill"]
LOOKING = [name for name in BUILT_IN if name not in ("streaming", "dense")]
SCORING = {name: row.score for name, row in ESTIMATORS.items() if row.score is not None}
SELECT = torch.ops.flexprefill.select_blocks.default
SELECT_MASKED = torch.ops.flexprefill.select_masked_blocks.default


def make_config(estimator: str, **settings: Any) -> SparsePrefillConfig:
    return SparsePrefillConfig(**({"gamma": 0.8, "min_budget": 0, "block_size": BLOCK} | settings), estimator=estimator)


@pytest.mark.parametrize("estimator", LOOKING)
@pytest.mark.parametrize("case", ["right", "left", "packed"])
def test_a_prompt_at_whole_blocks_selects_what_it_selects_alone(estimator: str, case: str) -> None:
    length = 320
    query, key = random_qk(3, 2, 4, 2, length, 16, spread=2)
    bounds: list[list[tuple[int, int]]] = {
        "right": [[(0, 250)], [(0, 111)]],
        "left": [[(64, 320)], [(224, 320)]],
        "packed": [[(0, 96), (96, 320)], [(0, 224), (224, 320)]],
    }[case]
    if case == "packed":
        mask_mod = masks.packed([[stop - start for start, stop in row] for row in bounds])
    else:
        mask_mod = masks.padded([row[0][0] for row in bounds], [row[0][1] for row in bounds])
    facts = masks.find_facts(mask_mod, AttentionSizes(2, 1, length, length), BLOCK, is_packed=case == "packed")
    config = make_config(estimator, min_budget=40, dense_last=10)
    selected = select_masked_prefill_blocks(query, key, None, facts, ScoreRule(SCALE), config)
    for row, of_row in enumerate(bounds):
        for start, stop in of_row:
            one = slice(row, row + 1), slice(None), slice(start, stop)
            blocks = slice(start // BLOCK, count_blocks(stop, BLOCK))
            alone = select_prefill_blocks(query[one], key[one], None, SCALE, config)
            assert torch.equal(selected[row : row + 1, :, blocks, blocks], alone)
            assert not selected[row, :, blocks, : blocks.start].any()


@pytest.mark.parametrize("estimator", SCORES)
@pytest.mark.parametrize(("start", "stop"), [(0, 101), (13, 131), (50, 90)])
def test_scores_of_a_padded_prompt_are_those_of_its_own_tokens(estimator: str, start: int, stop: int) -> None:
    query, key = random_qk(start, 1, 4, 2, 131, 8, spread=2)
    facts = masks.find_facts(masks.padded([start], [stop]), AttentionSizes(1, 1, 131, 131), BLOCK)
    grid = facts.possible & facts.query_counts.any(-1)[:, None, :, None] & facts.key_counts.any(-1)[:, None, None]
    actual = SCORING[estimator](EstimatorInputs(query, key, SCALE, BLOCK, grid, facts))
    for head in range(4):
        expected = SCORES[estimator](query[0, head], key[0, head // 2], SCALE, BLOCK, start, stop)
        torch.testing.assert_close(actual[0, head], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimator", BUILT_IN)
def test_padding_has_no_say(estimator: str) -> None:
    query, key = random_qk(0, 2, 4, 2, 300, 16, spread=2)
    facts = masks.find_facts(masks.padded([0, 37], [203, 290]), AttentionSizes(2, 1, 300, 300), BLOCK)
    config = make_config(estimator, min_budget=40)
    clean = select_masked_prefill_blocks(query, key, None, facts, ScoreRule(SCALE), config)
    for x in (query, key):
        x[0, :, 203:], x[1, :, :37], x[1, :, 290:] = 1e4, -1e4, 1e4
    assert torch.equal(select_masked_prefill_blocks(query, key, None, facts, ScoreRule(SCALE), config), clean)


@pytest.mark.parametrize("estimator", [*SCORING, "streaming"])
def test_a_chunk_selects_what_its_rows_select_in_the_whole_prompt(estimator: str) -> None:
    query, key = random_qk(0, 1, 4, 2, 300, 16, spread=2)
    config = make_config(estimator, min_budget=40)
    whole = select_prefill_blocks(query, key, None, SCALE, config)
    offset = 4 * BLOCK
    facts = masks.find_facts(masks.chunk(offset), AttentionSizes(1, 1, 300 - offset, 300), BLOCK, offset=offset)
    chunk = select_masked_prefill_blocks(query[:, :, offset:], key, None, facts, ScoreRule(SCALE), config)
    assert torch.equal(chunk, whole[:, :, 4:])


@pytest.mark.parametrize("estimator", SCORING)
@pytest.mark.parametrize("offset", [0, 37])
def test_blocks_that_a_mask_crosses_are_computed_and_weigh_nothing(estimator: str, offset: int) -> None:
    length = 400
    query, key = random_qk(0, 1, 4, 2, length, 16, spread=2)
    sizes = AttentionSizes(1, 1, length - offset, length)
    facts = masks.find_facts(masks.chunk(offset, masks.window(150)), sizes, BLOCK, offset=offset)
    config = make_config(estimator, gamma=0.5)
    rule = ScoreRule(SCALE, softcap=20.0)
    selected = select_masked_prefill_blocks(query[:, :, offset:], key, None, facts, rule, config)
    crossed = (facts.possible & ~facts.certain & ~facts.required).expand_as(selected)
    assert crossed.any()
    assert selected[crossed].all()
    assert not (selected & ~facts.possible).any()
    # Keys that only crossed blocks hold for a row are not looked at by it.
    last = -1
    hidden = crossed[0, 0, last].repeat_interleave(BLOCK)[:length]
    key[:, :, hidden] += 5
    again = select_masked_prefill_blocks(query[:, :, offset:], key, None, facts, rule, config)
    assert torch.equal(again[:, :, last], selected[:, :, last])


@pytest.mark.parametrize("estimator", BUILT_IN)
def test_gamma_1_is_every_possible_block_under_a_mask_and_a_bias(estimator: str) -> None:
    query, key = random_qk(0, 2, 4, 2, 200, 16, spread=2)
    facts = masks.find_facts(masks.padded([0, 16], [190, 200]), AttentionSizes(2, 1, 200, 200), BLOCK)
    for bias, max_budget in [(None, None), (torch.randn(facts.row_mask.shape), 10**6)]:
        config = make_config(estimator, gamma=1, max_budget=max_budget)
        selected = select_masked_prefill_blocks(query, key, None, facts, ScoreRule(SCALE, None, bias), config)
        rows = facts.query_counts.any(-1)[:, None, :, None].expand_as(selected)
        assert torch.equal(selected & rows, facts.possible.expand_as(selected) & rows)


@pytest.mark.parametrize("estimator", SCORING)
def test_with_a_bias_heads_are_vertical_slash(estimator: str) -> None:
    query, key = random_qk(0, 1, 4, 2, 300, 16, spread=2)
    facts = masks.find_facts(masks.causal, AttentionSizes(1, 1, 300, 300), BLOCK)
    rule = ScoreRule(SCALE, None, torch.randn(facts.row_mask.shape))
    chosen, expected = (
        select_masked_prefill_blocks(query, key, None, facts, rule, make_config(name))
        for name in (estimator, "flexprefill")
    )
    assert torch.equal(chosen, expected)
