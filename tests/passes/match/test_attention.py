"""Calls of attention: SDPA under masks, and modules of torch that fuse it with projections."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.attention_forms import (
    ADDED,
    CAUSAL,
    HEAD_DIM,
    HEADS,
    LENGTH,
    match_one,
    qkv,
    skip_one,
)
from torch import nn
from torch.nn import functional as F

from flexprefill_compile.passes.match.site import Masked
from flexprefill_compile.report import SkipReason


def test_sdpa_under_a_mask_is_a_site() -> None:
    site = match_one(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, CAUSAL, scale=0.3), *qkv())
    assert isinstance(site.scores, Masked)
    assert site.scale == 0.3
    added = match_one(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=ADDED), *qkv())
    assert site.signature != added.signature


def test_a_mask_lets_lengths_differ() -> None:
    mask = torch.ones(LENGTH, 2 * LENGTH, dtype=torch.bool).tril(LENGTH)
    inputs = qkv(key_length=2 * LENGTH)
    match_one(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask), *inputs)
    match_one(lambda q, k, v: (q @ k.mT).masked_fill(~mask, -1e9).softmax(-1) @ v, *inputs)


SIZE = HEADS * HEAD_DIM


FUSED = {
    "weights": (nn.MultiheadAttention(SIZE, HEADS, batch_first=True), {"need_weights": True}),
    "no weights": (nn.MultiheadAttention(SIZE, HEADS, batch_first=True), {"need_weights": False}),
    "causal": (nn.MultiheadAttention(SIZE, HEADS), {"attn_mask": ADDED, "is_causal": True, "need_weights": False}),
    "layer": (nn.TransformerEncoderLayer(SIZE, HEADS, SIZE, batch_first=True), {}),
    "causal layer": (nn.TransformerEncoderLayer(SIZE, HEADS, SIZE), {"src_mask": ADDED, "is_causal": True}),
    "norm first": (nn.TransformerEncoderLayer(SIZE, HEADS, SIZE, norm_first=True), {"src_mask": ADDED}),
}


@pytest.mark.parametrize(("module", "options"), FUSED.values(), ids=FUSED)
@torch.no_grad()
def test_torch_s_own_attention_modules_are_reported(module: nn.Module, options: dict[str, Any]) -> None:
    module.eval()
    x = torch.randn(LENGTH, LENGTH, SIZE)
    inputs = (x, x, x) if isinstance(module, nn.MultiheadAttention) else (x,)
    skipped = skip_one(lambda *inputs: module(*inputs, **options), *inputs)
    assert skipped.reason is SkipReason.FUSED
