"""Sinks are recognised where each head has one, joined to its logits and dropped from the weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.attention_forms import ADDED, BATCH, HEADS, LENGTH, SCALE, match_one, qkv, skip_one
from torch import Tensor
from torch.nn import functional as F

from flexprefill_compile.passes.match.site import Logits
from flexprefill_compile.report import SkipReason

SINKS = torch.linspace(-2.0, 2.0, HEADS)


def gpt_oss(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    logits = torch.matmul(q, k.transpose(2, 3)) * SCALE + ADDED
    sinks = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    joined = torch.cat([logits, sinks], dim=-1)
    joined = joined - joined.max(dim=-1, keepdim=True).values
    weights = F.softmax(joined, dim=-1, dtype=joined.dtype)[..., :-1]
    return torch.matmul(F.dropout(weights, p=0.0, training=False).to(v.dtype), v)


def flint(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    logits = q @ k.mT + ADDED
    sinks = sinks.reshape(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
    return F.softmax(torch.cat([logits, sinks], dim=-1), dim=-1)[..., :-1].to(v.dtype) @ v


FORMS = {
    "gpt_oss": gpt_oss,
    "flint": flint,
    "expanded twice": lambda q, k, v, s: (
        torch.concat((q @ k.mT + ADDED, s.view(1, HEADS, 1, 1).expand(1, -1, LENGTH, 1).expand(BATCH, -1, -1, -1)), -1)
        .softmax(-1)[..., :-1]
        .matmul(v)
    ),
}


@pytest.mark.parametrize("call", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_sinks_belong_to_the_site(call: Callable[..., Tensor], dynamic: bool) -> None:
    site = match_one(call, *qkv(), SINKS, dynamic=dynamic)
    assert isinstance(site.scores, Logits)
    assert site.sinks is not None


def edited_sinks(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    s = s.clone()
    sinks = s.view(1, HEADS, 1, 1)
    joined = torch.cat([q @ k.mT + ADDED, sinks.expand(BATCH, -1, LENGTH, -1)], dim=-1)
    s.zero_()
    return joined.softmax(-1)[..., :-1] @ v


def edited_logits(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    joined = torch.cat([q @ k.mT + ADDED, s.view(1, HEADS, 1, 1).expand(BATCH, -1, LENGTH, -1)], dim=-1)
    joined[..., 0] = 0
    return joined.softmax(-1)[..., :-1] @ v


NO_SINKS = {
    "another column dropped": lambda q, k, v, s: (
        torch.cat([q @ k.mT + ADDED, s.view(1, HEADS, 1, 1).expand(BATCH, -1, LENGTH, -1)], -1).softmax(-1)[..., 1:] @ v
    ),
    "two sinks": lambda q, k, v, s: (
        torch.cat([q @ k.mT + ADDED, s.view(1, HEADS, 1, 1).expand(BATCH, -1, LENGTH, 2)], -1).softmax(-1)[..., :-2] @ v
    ),
    "joined in front": lambda q, k, v, s: (
        torch.cat([s.view(1, HEADS, 1, 1).expand(BATCH, -1, LENGTH, -1), q @ k.mT + ADDED], -1).softmax(-1)[..., 1:] @ v
    ),
    "of each prompt": lambda q, k, v, s: (
        torch.cat([q @ k.mT + ADDED, (q[:, :, :1, :1] + s.view(1, -1, 1, 1)).expand(-1, -1, LENGTH, -1)], -1).softmax(
            -1
        )[..., :-1]
        @ v
    ),
    "edited sinks": edited_sinks,
    "edited logits": edited_logits,
}


@pytest.mark.parametrize("call", NO_SINKS.values(), ids=NO_SINKS)
def test_what_is_no_sink_for_each_head_stays_dense(call: Callable[..., Tensor]) -> None:
    assert skip_one(call, *qkv(), SINKS).reason is SkipReason.UNRECOGNISED
