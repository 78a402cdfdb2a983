"""Recall and error of an attention call are what a float64 computation with all scores says of the same rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.audited_models import BLOCK, LENGTH, OPTIONS, gemma, llama, tokens
from helpers.checked_attention import without_code_generation
from torch import Tensor, nn
from torch.testing import assert_close

from flexprefill_compile.block_masks.layout import unpack_blocks
from flexprefill_compile.block_masks.observed_attention import ObservedAttention
from flexprefill_compile.quality.audit.attention_call import measure_call
from flexprefill_compile.quality.audit.observe import prefill_observed
from flexprefill_compile.quality.model_prefill import Prompt


def padding() -> Tensor:
    """One prompt is padded on the left, one on the right, where padding sees tokens and still must not count."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :77] = 0
    mask[1, 150:] = 0
    return mask


def causal(length: int = LENGTH) -> Tensor:
    return torch.ones(1, 1, length, length, dtype=torch.bool).tril()


def windowed() -> Tensor:
    return causal() & ~causal().tril(-70)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], list[Tensor], float | None]] = {
    "plain": (lambda: llama(num_key_value_heads=4, num_hidden_layers=1), {}, [causal()], None),
    "gqa": (llama, {}, [causal()] * 2, None),
    "padded": (llama, {"attention_mask": padding()}, [causal() & padding().bool()[:, None, None]] * 2, None),
    "window and softcap": (gemma, {}, [windowed(), causal()], 2.0),
}


def brute_force(call: ObservedAttention, mask: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Return recall (B, H, S) and error (B, H, S, 2) of all rows with all scores at once, in float64.

    Args:
        call: What was observed.
        mask: (B, 1, S, S) bool, what the model's attention means.
        softcap: Of the scores.
    """
    group = call.query.shape[1] // call.key.shape[1]
    key, value = (x.double().repeat_interleave(group, dim=1) for x in (call.key, call.value))
    scores = call.query.double() @ key.mT * call.rule.scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0)
    num_blocks = -(-call.key.shape[2] // BLOCK)
    tables = call.tables
    blocks = unpack_blocks(tables.kv_num_blocks, tables.kv_indices, num_blocks) | unpack_blocks(
        tables.full_kv_num_blocks, tables.full_kv_indices, num_blocks
    )
    selected = blocks.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)[..., : mask.shape[-2], : mask.shape[-1]]
    kept = weights * selected
    recall = kept.sum(-1)
    sparse = kept @ value / recall.clamp(min=1e-9).unsqueeze(-1)
    dense = weights @ value
    return recall, torch.stack([(sparse - dense).square().sum(-1), dense.square().sum(-1)], dim=-1)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_recall_and_error_are_those_of_a_brute_force_computation(case: str) -> None:
    make, kwargs, masks, softcap = CASES[case]
    prompt = Prompt((tokens(2 if kwargs else 1),), kwargs)
    compared: list[bool] = []

    def compare(call: ObservedAttention) -> None:
        measured = measure_call(call, BLOCK)
        recall, squares = brute_force(call, masks[len(compared)], softcap)
        is_counted = padding().bool()[:, call.rows] if kwargs else torch.ones(1, len(call.rows), dtype=torch.bool)
        assert torch.equal(measured.is_counted, is_counted)
        expected = recall[:, :, call.rows]
        heads = is_counted.unsqueeze(1).expand_as(expected)
        assert_close(measured.recall[heads].double(), expected[heads], rtol=1e-4, atol=1e-5)
        totals = (squares[:, :, call.rows] * heads.unsqueeze(-1)).sum((0, 2))
        assert_close(measured.error.double(), (totals[:, 0] / totals[:, 1]).sqrt(), rtol=1e-3, atol=1e-5)
        assert measured.error.max() > 0.01, "nothing is lost, so that nothing is tested"
        compared.append(True)

    with without_code_generation(is_dense=False):
        prefill_observed(make(), prompt, OPTIONS | {"min_length": 32}, compare, num_rows=48)
    assert len(compared) == len(masks)
