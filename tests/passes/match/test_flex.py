"""FlexAttention calls are described with their own functions and blocks."""

from __future__ import annotations

from typing import Any

import torch
from helpers.attention_forms import (
    HEADS,
    KV_HEADS,
    LENGTH,
    match_one,
    qkv,
    repeat_kv,
    skip_one,
)
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from flexprefill_compile.passes.graph.nodes import example_of
from flexprefill_compile.passes.graph.operations import operation
from flexprefill_compile.passes.match.site import FlexMods
from flexprefill_compile.report import SkipReason

BLOCK_MASK = create_block_mask(lambda b, h, q, k: q >= k, None, None, LENGTH, LENGTH, device="cpu")


def flex_with_mods(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    def add_bias(score: Tensor, batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        return torch.tanh(score) + bias[head]

    return flex_attention(q, k, v, add_bias, BLOCK_MASK, 0.3, enable_gqa=True)


def test_a_flex_attention_call_is_a_site() -> None:
    site = match_one(flex_with_mods, *qkv(KV_HEADS), torch.randn(HEADS))
    mods = site.scores
    assert isinstance(mods, FlexMods)
    assert (site.scale, example_of(site.key).shape[1]) == (0.3, KV_HEADS)
    score = mods.score_mod(*map(torch.tensor, (2.0, 0, 1, 2, 3)), bias := torch.arange(4.0))
    assert score == torch.tensor(2.0).tanh() + bias[1]
    assert [mods.mask_mod(*map(torch.tensor, (0, 0, q, k))).item() for q, k in [(2, 3), (3, 2)]] == [False, True]
    assert [example_of(capture).shape for capture in mods.score_captures] == [(HEADS,)]
    assert mods.mask_captures == ()
    assert mods.block_mask[:2] == (LENGTH, LENGTH)
    assert len(mods.block_mask) == len(BLOCK_MASK.as_tuple())
    assert mods.kernel_options["OUTPUT_LOGSUMEXP"] is False
    assert operation(site.node) == "getitem"


def test_a_flex_attention_call_without_mods_is_a_site() -> None:
    site = match_one(lambda q, k, v: flex_attention(q, repeat_kv(k), repeat_kv(v)), *qkv(KV_HEADS))
    assert isinstance(site.scores, FlexMods)
    assert example_of(site.key).shape[1] == KV_HEADS
    other = match_one(flex_with_mods, *qkv(KV_HEADS), torch.randn(HEADS))
    assert other.signature != site.signature


def test_a_flex_attention_call_whose_logsumexp_is_used_stays_as_it_is() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flex_attention(q, k, v, return_lse=True)

    assert skip_one(call, *qkv()).reason is SkipReason.WEIGHTS_USED
    match_one(lambda *inputs: call(*inputs)[0], *qkv())
    assert skip_one(lambda q, k, v: flex_attention(q[:, :, :1], k, v), *qkv()).reason is SkipReason.DECODE
