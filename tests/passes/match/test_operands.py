"""Operands of attention are followed back: repeated heads and casts that lose nothing are undone, nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.attention_forms import (
    ADDED,
    BATCH,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LENGTH,
    match_one,
    qkv,
    repeat_kv,
)
from torch import Tensor
from torch.nn import functional as F

from flexprefill_compile.passes.graph.nodes import example_of

REPETITIONS = {
    "repeat_kv": repeat_kv,
    "unsqueeze": lambda x: x.unsqueeze(2).expand(-1, -1, 2, -1, -1).contiguous().view(BATCH, HEADS, LENGTH, HEAD_DIM),
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=1),
    "torch.repeat_interleave": lambda x: torch.repeat_interleave(x, repeats=2, dim=-3),
    "repeat": lambda x: x.unsqueeze(2).repeat(1, 1, 2, 1, 1).flatten(1, 2),
    "broadcast_to": lambda x: torch.broadcast_to(x[:, :, None], (BATCH, 2, 2, LENGTH, HEAD_DIM)).reshape(
        BATCH, -1, LENGTH, HEAD_DIM
    ),
}


@pytest.mark.parametrize("repeat", REPETITIONS.values(), ids=REPETITIONS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_repeated_heads_are_undone(repeat: Callable[[Tensor], Tensor], dynamic: bool) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, repeat(k), repeat(v), is_causal=True)

    site = match_one(call, *qkv(KV_HEADS), dynamic=dynamic)
    assert example_of(site.key).shape[1] == example_of(site.value).shape[1] == KV_HEADS
    assert site.shapes.key.startswith(f"{example_of(site.key).shape[0]}x{KV_HEADS}x")


def test_one_head_expanded_for_all_is_undone() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k.expand_as(q), v.expand(-1, HEADS, -1, -1), is_causal=True)

    assert example_of(match_one(call, *qkv(1)).key).shape[1] == 1


def edit_after_repeating(x: Tensor) -> Tensor:
    x = x.clone()
    repeated = repeat_kv(x)
    x.zero_()
    return repeated


OTHER_REPETITIONS = {
    "heads in another order": (lambda x: x.repeat(1, 2, 1, 1), lambda x: x.repeat(1, 2, 1, 1)),
    "heads in another order, expanded": (
        lambda x: x[:, None].expand(-1, 2, -1, -1, -1).reshape(BATCH, HEADS, LENGTH, HEAD_DIM),
    )
    * 2,
    "tokens, not heads": (
        lambda x: x[:, :, : LENGTH // 2].repeat_interleave(2, dim=2).repeat(1, 2, 1, 1),
        lambda x: x[:, :, : LENGTH // 2].repeat_interleave(2, dim=2).repeat(1, 2, 1, 1),
    ),
    "a transposition between": (
        lambda x: x[:, :, None].expand(-1, -1, 2, -1, -1).transpose(1, 2).reshape(BATCH, HEADS, LENGTH, HEAD_DIM),
        lambda x: x[:, :, None].expand(-1, -1, 2, -1, -1).transpose(1, 2).reshape(BATCH, HEADS, LENGTH, HEAD_DIM),
    ),
    "the key alone": (repeat_kv, lambda x: repeat_kv(x) + 0),
    "bits read as another dtype": (lambda x: repeat_kv(x.bfloat16()).view(torch.float16).float(),) * 2,
    "rounded": (lambda x: repeat_kv(x).bfloat16().float(),) * 2,
    "edited since": (edit_after_repeating, repeat_kv),
}


@pytest.mark.parametrize("repeat", OTHER_REPETITIONS.values(), ids=OTHER_REPETITIONS)
def test_what_repeats_otherwise_is_left(repeat: tuple[Callable[[Tensor], Tensor], ...]) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, repeat[0](k), repeat[1](v), is_causal=True)

    assert example_of(match_one(call, *qkv(KV_HEADS)).key).shape[1] == HEADS


def test_tokens_that_repeat_are_no_heads() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(2, dim=2) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    assert example_of(match_one(call, *qkv(key_length=LENGTH // 2)).key).shape[2] == LENGTH


def test_casts_that_lose_nothing_are_undone() -> None:
    """GPT-J's way: the scores in float32 of a bfloat16 query and key."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q.float() @ repeat_kv(k).to(torch.float32).mT + ADDED).softmax(-1)
        return weights.type_as(v) @ repeat_kv(v)

    site = match_one(call, *qkv(KV_HEADS, dtype=torch.bfloat16))
    assert example_of(site.query).dtype == example_of(site.key).dtype == site.dtype == torch.bfloat16
    assert example_of(site.key).shape[1] == KV_HEADS
