"""Attention that a model wrote out is described as what it computes, or reported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.attention_forms import (
    ADDED,
    BATCH,
    CAUSAL,
    HEAD_DIM,
    HEADS,
    LENGTH,
    SCALE,
    match_one,
    qkv,
    repeat_kv,
    skip_one,
)
from helpers.graphs import match_graphs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flexprefill_compile.passes.match.site import AttentionSite, Logits
from flexprefill_compile.report import SkipReason


def merged_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bloom's way: B and H merged, the bias and the scale inside baddbmm."""
    batch, num_heads, length, head_dim = q.shape
    q, k, v = (x.reshape(batch * num_heads, -1, head_dim) for x in (q, k, v))
    bias = torch.arange(length).expand(batch * num_heads, 1, length).to(q.dtype)
    logits = bias.baddbmm(batch1=q, batch2=k.transpose(-1, -2), beta=0.5, alpha=SCALE)
    logits = logits.view(batch, num_heads, length, -1)
    weights = F.softmax(logits + ADDED, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.bmm(weights.view(batch * num_heads, length, length), v)


def private_edits(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = q @ k.mT
    logits *= SCALE
    logits += ADDED
    return logits.softmax(-1) @ v


def softcapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = torch.tanh(torch.matmul(q, k.transpose(2, 3)) * SCALE / 5) * 5
    return torch.matmul(F.dropout(torch.softmax(logits + ADDED, dim=3), 0.1, training=False), v)


def row_maximum_taken_off(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = q @ k.mT + ADDED
    return F.softmax(logits - logits.max(dim=-1, keepdim=True).values, dim=-1) @ v


WRITTEN_OUT = {
    "hugging face": lambda q, k, v: F.dropout(
        F.softmax(q.matmul(k.transpose(2, 3)) * SCALE + ADDED, dim=-1, dtype=torch.float32).to(q.dtype), p=0.0
    ).matmul(v),
    "operators": lambda q, k, v: (q * SCALE @ k.mT).masked_fill(~CAUSAL, -torch.inf).softmax(-1) @ v,
    "where": lambda q, k, v: torch.where(CAUSAL, q @ k.permute(0, 1, 3, 2), -1e9).softmax(dim=3) @ v,
    "special": lambda q, k, v: torch.special.softmax(q @ k.swapaxes(-1, -2) / 4.0 + ADDED, -1).contiguous() @ v,
    "module": lambda q, k, v: nn.Softmax(dim=-1)(torch.matmul(q, k.transpose(-1, -2)) + ADDED) @ v,
    "softcap": softcapped,
    "merged heads": merged_heads,
    "edited in place, unseen": private_edits,
    "mask cast to its dtype": lambda q, k, v: ((x := q @ k.mT) + ADDED.bfloat16().type_as(x)).softmax(-1) @ v,
    "maximum": lambda q, k, v: torch.max(q @ k.mT + ADDED, torch.tensor(-1e6)).softmax(-1) @ v,
    "row maximum taken off": row_maximum_taken_off,
    "one key head": lambda q, k, v: (q @ k[:, :1].mT + ADDED).softmax(-1) @ v[:, :1],
    "repeat_kv": lambda q, k, v: (q @ repeat_kv(k[:, :2]).transpose(2, 3) + ADDED).softmax(-1) @ repeat_kv(v[:, :2]),
}


@pytest.mark.parametrize("call", WRITTEN_OUT.values(), ids=WRITTEN_OUT)
@pytest.mark.parametrize("dynamic", [False, True])
def test_attention_written_out_is_a_site(call: Callable[..., Tensor], dynamic: bool) -> None:
    site = match_one(call, *qkv(), dynamic=dynamic)
    assert isinstance(site.scores, Logits)


def hidden_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q[:, 0] @ k[:, 0].mT + ADDED).softmax(-1) @ v[:, 0]


def sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPT-OSS's way."""
    logits = torch.cat([q @ k.mT + ADDED, torch.ones(BATCH, HEADS, LENGTH, 1)], dim=-1)
    return logits.softmax(-1)[..., :-1] @ v


def edited_logits(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = q @ k.mT + ADDED
    logits[:, :, 0] = 0
    return logits.softmax(-1) @ v


def edited_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.clone()
    weights = (q @ k.mT + ADDED).softmax(-1)
    q.zero_()
    return weights @ v


def shared_edit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    halves = scores.view(BATCH, HEADS, LENGTH, LENGTH)
    scores += ADDED
    return (scores + halves).softmax(-1) @ v


def widened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.float() + 0.1, k.float()
    return (q @ k.mT + ADDED).softmax(-1).to(v.dtype) @ v


NOT_RECOGNISED = {
    "sinks": sinks,
    "einsum": lambda q, k, v: torch.einsum(
        "bhqk,bhkd->bhqd", (torch.einsum("bhqd,bhkd->bhqk", q, k) + ADDED).softmax(-1), v
    ),
    "two products": lambda q, k, v: (q @ k.mT + v @ k.mT + ADDED).softmax(-1) @ v,
    "product in the bias": lambda q, k, v: (q @ k.mT + (q @ v.mT).roll(1, -1) + ADDED).softmax(-1) @ v,
    "row maximum twice": lambda q, k, v: (x := q @ k.mT + ADDED).sub(x.amax(-1, keepdim=True), alpha=2).softmax(-1) @ v,
    "another maximum": lambda q, k, v: ((x := q @ k.mT + ADDED) - x.amax(-2, keepdim=True)).softmax(-1) @ v,
    "two rows in one": lambda q, k, v: (
        (q @ k.mT + ADDED).view(BATCH, HEADS, LENGTH // 2, -1).softmax(-1).view(BATCH, HEADS, LENGTH, LENGTH) @ v
    ),
    "weights times themselves": lambda q, k, v: (weights := (q @ k.mT + ADDED).softmax(-1)) @ weights,
    "another dimension": lambda q, k, v: (q @ k.mT + ADDED).softmax(-2) @ v,
    "weights times something": lambda q, k, v: ((q @ k.mT + ADDED).softmax(-1) * 0.5) @ v,
    "no head dimension": hidden_heads,
    "key made transposed": lambda q, k, v: (q @ k.transpose(1, 2).permute(0, 2, 3, 1) + ADDED).softmax(-1) @ v,
    "logits edited": edited_logits,
    "query edited": edited_query,
    "edited where seen": shared_edit,
}


@pytest.mark.parametrize("call", NOT_RECOGNISED.values(), ids=NOT_RECOGNISED)
def test_attention_in_another_form_is_reported(call: Callable[..., Tensor]) -> None:
    skipped = skip_one(call, *qkv())
    assert skipped.reason is SkipReason.UNRECOGNISED
    assert skipped.detail


def test_scores_wider_than_the_output_are_not_narrowed() -> None:
    skipped = skip_one(widened, *qkv(dtype=torch.bfloat16))
    assert (skipped.reason, skipped.detail) == (
        SkipReason.UNRECOGNISED,
        "scores in torch.float32, result in torch.bfloat16",
    )


WRITTEN_OUT_DENSE = [
    (SkipReason.WEIGHTS_USED, lambda q, k, v: ((weights := (q @ k.mT + ADDED).softmax(-1)) @ v, weights)),
    (SkipReason.WEIGHTS_USED, lambda q, k, v: ((weights := (q @ k.mT + ADDED).softmax(-1)) @ v, weights @ k)),
    (SkipReason.DROPOUT, lambda q, k, v: F.dropout((q @ k.mT + ADDED).softmax(-1)) @ v),
    (SkipReason.NOT_CAUSAL, lambda q, k, v: (q @ k.mT * SCALE).softmax(-1) @ v),
    (SkipReason.DECODE, lambda q, k, v: (q[:, :, :1] @ k.mT + ADDED[:1]).softmax(-1) @ v),
    (SkipReason.TOO_SHORT, lambda q, k, v: (q @ k[:, :, :31].mT + ADDED[:, :31]).softmax(-1) @ v[:, :, :31]),
    (SkipReason.HEAD_DIM, lambda q, k, v: (q[..., :8] @ k[..., :8].mT + ADDED).softmax(-1) @ v),
    (SkipReason.SHAPE, lambda q, k, v: (q @ k[:1].mT + ADDED).softmax(-1) @ v[:1]),
    (SkipReason.SHAPE, lambda q, k, v: (q[:, :1] @ k[:, :1].mT + torch.ones(HEADS, 1, 1) + ADDED).softmax(-1) @ v),
]


@pytest.mark.parametrize(("reason", "call"), WRITTEN_OUT_DENSE)
def test_each_reason_holds_for_attention_written_out(reason: SkipReason, call: Callable[..., Any]) -> None:
    assert skip_one(call, *qkv()).reason is reason


def test_attention_written_out_under_autograd_stays_dense() -> None:
    assert skip_one(WRITTEN_OUT["operators"], *qkv(requires_grad=True)).reason is SkipReason.GRADIENT


def test_a_shape_that_bias_broadcasts_is_not_recognised() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT)[None] + torch.ones(3, 1, 1, 1, 1) + ADDED).softmax(-1)[2] @ v

    assert skip_one(call, *qkv()).reason is SkipReason.UNRECOGNISED


def router(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A mixture of experts: softmax over a product with weights, whose result multiplies tokens."""
    tokens = q.transpose(1, 2).flatten(2)
    weights = F.linear(tokens, torch.ones(4, HEADS * HEAD_DIM)).softmax(-1)
    weights = torch.topk(weights, 2, dim=-1).values
    return (tokens[:, :, None] * weights[..., None]).sum(2)


NO_ATTENTION = {
    "router": router,
    "router by matmul": lambda q, k, v: (q @ torch.ones(HEAD_DIM, 4)).softmax(-1) @ v[:, :, :4],
    "sampling": lambda q, k, v: (q @ k.mT).softmax(-1).argmax(-1),
    "linear attention": lambda q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v),
    "no softmax": lambda q, k, v: (q @ k.mT * CAUSAL) @ v,
}


@pytest.mark.parametrize("call", NO_ATTENTION.values(), ids=NO_ATTENTION)
def test_other_softmaxes_and_products_are_ignored(call: Callable[..., Tensor]) -> None:
    matches, _ = match_graphs(call, *qkv())
    assert matches == []


def test_weights_that_nobody_uses_in_the_end_are_no_use() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT + ADDED).softmax(-1)
        weights.sum(-1)
        return weights @ v

    match_one(call, *qkv())


def in_autocast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.softmax(q @ k.mT + ADDED.bfloat16(), dim=-1, dtype=torch.float32) @ v


def in_inference_mode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.inference_mode():
        return WRITTEN_OUT["operators"](q, k, v)


def in_no_grad(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        return WRITTEN_OUT["repeat_kv"](q, k, v)


def in_sdpa_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, repeat_kv(k[:, :2]), repeat_kv(v[:, :2]), CAUSAL)


REGIONS = [in_autocast, in_inference_mode, in_no_grad, in_sdpa_kernel]


@pytest.mark.parametrize("call", REGIONS)
def test_attention_inside_a_region_is_a_site(call: Callable[..., Tensor]) -> None:
    site = match_one(call, *qkv(requires_grad=call is in_no_grad))
    assert site.dtype == (torch.bfloat16 if call is in_autocast else torch.float32)


@pytest.mark.parametrize("name", ["hugging face", "merged heads", "repeat_kv"])
def test_attention_in_checkpointed_code_is_a_site(name: str) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(WRITTEN_OUT[name], q, k, v, use_reentrant=False)

    (site,), _ = match_graphs(call, *qkv())
    assert isinstance(site, AttentionSite)
    assert isinstance(site.scores, Logits)
