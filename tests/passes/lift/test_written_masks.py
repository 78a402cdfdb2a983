"""Masks as code in use writes them: rewritten, and at gamma 1 equal to eager."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers.checked_attention import without_code_generation
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from flexprefill_compile.backend import FlexPrefillBackend
from flexprefill_compile.report import RewriteReport, SkipReason

LENGTH, KEYS = 60, 100
OPTIONS: dict[str, Any] = {"gamma": 1.0, "block_size": 16, "min_length": 16, "check_masks": True}
BUFFER = torch.ones(128, 128, dtype=torch.bool).tril()
POSITIONS = torch.arange(LENGTH)
PAD = torch.arange(LENGTH)[None] >= 50
Make = Callable[..., Tensor]


def future(length: int = LENGTH, keys: int = LENGTH, diagonal: int = 1) -> Tensor:
    return torch.ones(length, keys, dtype=torch.bool).triu(diagonal)


def hide(hidden: Tensor) -> Tensor:
    return torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)


def blocks_joined(q: Tensor, k: Tensor) -> Tensor:
    start = k.shape[2] - q.shape[2]
    own = torch.triu(torch.full((q.shape[2], q.shape[2]), -torch.inf), diagonal=1)
    return torch.hstack([torch.zeros((q.shape[2], start)), own])


MASKS: dict[str, tuple[Make, tuple[Tensor, ...], int]] = {
    "not (future or padding)": (lambda q, k, pad: ~(future() | pad[:, None, None, :]), (PAD,), LENGTH),
    "not of logical_or": (
        lambda q, k, pad: torch.logical_or(future(), pad[:, None, None]).logical_not(),
        (PAD,),
        LENGTH,
    ),
    "hidden of three": (
        lambda q, k, pad: ~(future() | pad[:, None, None] | (pad[:, None, None] & future())),
        (PAD,),
        LENGTH,
    ),
    "== False": (lambda q, k, pad: (future() | pad[:, None, None]) == False, (PAD,), LENGTH),  # noqa: E712
    "filled by an or": (lambda q, k, pad: hide(future() | pad[:, None, None]), (PAD,), LENGTH),
    "rows of a buffer": (lambda q, k, b, p: b[p][:, : k.shape[2]], (BUFFER, POSITIONS), KEYS),
    "rows of a buffer, 4-D": (lambda q, k, b, p: b[None, None, p, : k.shape[2]], (BUFFER, POSITIONS), KEYS),
    "rows counted from the end": (lambda q, k, b, p: b[p - 128][:, : k.shape[2]], (BUFFER, POSITIONS), KEYS),
    "index_select": (lambda q, k, b, p: b.index_select(0, p)[:, : k.shape[2]], (BUFFER, POSITIONS), KEYS),
    "rows of an additive buffer": (lambda q, k, b, p: b[p][:, : k.shape[2]], (hide(~BUFFER), POSITIONS), KEYS),
    "blocks joined": (blocks_joined, (), KEYS),
    "blocks joined, none cached": (blocks_joined, (), LENGTH),
    "padded": (lambda q, k: F.pad(future().logical_not(), (KEYS - LENGTH, 0), value=True), (), KEYS),
    "joined padding": (
        lambda q, k, pad: (
            ~future(keys=KEYS, diagonal=1 + KEYS - LENGTH)
            & ~torch.cat([torch.zeros(1, KEYS - LENGTH, dtype=torch.bool), pad], -1)[:, None, None]
        ),
        (PAD,),
        KEYS,
    ),
    "shifts": (
        lambda q, k: ((POSITION[:, None] >> 2) >= (POSITION >> 2)) & (POSITION[:, None] >= POSITION),
        (),
        LENGTH,
    ),
    "a product of booleans": (lambda q, k, pad: ~future() * ~pad[:, None, None, :], (PAD,), LENGTH),
    "a sum of booleans": (lambda q, k, pad: ~(future() + pad[:, None, None, :]), (PAD,), LENGTH),
    "a product of numbers": (
        lambda q, k, pad: (~future()).float() * (~pad[:, None, None, :]).float() > 0.5,
        (PAD,),
        LENGTH,
    ),
    "one less a product": (
        lambda q, k, pad: (1.0 - (~future()).float() * (~pad[:, None, None]).float()) * torch.finfo(torch.float32).min,
        (PAD,),
        LENGTH,
    ),
    "counted": (lambda q, k, pad: (~future()).int() + (~pad[:, None, None, :]).int() == 2, (PAD,), LENGTH),
    "hidden, counted": (lambda q, k, pad: future().long() + pad[:, None, None, :].long() < 1, (PAD,), LENGTH),
    "chosen": (lambda q, k, pad: torch.where(pad[:, None, None, :], False, ~future()), (PAD,), LENGTH),
    "by lengths": (
        lambda q, k: torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(diagonal=k.shape[2] - q.shape[2]),
        (),
        KEYS,
    ),
}
POSITION = torch.arange(LENGTH)


def by_sdpa(make: Make) -> Callable[..., Tensor]:
    return lambda q, k, v, *captures: F.scaled_dot_product_attention(q, k, v, attn_mask=make(q, k, *captures))


def written_out(make: Make) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, *captures: Tensor) -> Tensor:
        mask = make(q, k, *captures)
        scores = q @ k.mT / 4
        masked = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return masked.softmax(-1) @ v

    return call


def run(call: Callable[..., Tensor], keys: int, *captures: Tensor, dynamic: bool = False) -> RewriteReport:
    query, key, value = torch.randn(1, 2, LENGTH, 16), *torch.randn(2, 1, 2, keys, 16)
    backend = FlexPrefillBackend()
    compiled = torch.compile(call, backend=backend, options=OPTIONS, dynamic=dynamic)
    with torch.no_grad(), without_code_generation():
        actual, expected = (function(query, key, value, *captures) for function in (compiled, call))
    torch.testing.assert_close(actual, expected)
    return backend.report


@pytest.mark.parametrize("form", [by_sdpa, written_out])
@pytest.mark.parametrize(("make", "captures", "keys"), MASKS.values(), ids=MASKS)
def test_it_runs_sparse_and_equals_eager(
    form: Callable[[Make], Callable[..., Tensor]], make: Make, captures: tuple[Tensor, ...], keys: int
) -> None:
    report = run(form(make), keys, *captures)
    assert report.num_rewritten == 1, str(report)


@pytest.mark.parametrize("name", ["not (future or padding)", "blocks joined", "by lengths", "rows of a buffer"])
def test_it_does_with_dynamic_sizes(name: str) -> None:
    make, captures, keys = MASKS[name]
    report = run(by_sdpa(make), keys, *captures, dynamic=True)
    assert report.num_rewritten == 1, str(report)


NOT_CAUSAL: dict[str, Make] = {
    "one of two counted": lambda q, k: (~future()).int() + (POSITION < 8).int() == 1,
    "any of two counted": lambda q, k: (~future()).int() + (POSITION < 8).int() >= 1,
    "a sum": lambda q, k: ~future() + (POSITION < 8),
    "a prefix that all see": lambda q, k: ~future() | (POSITION < 8),
    "not (future and far)": lambda q, k: ~(future() & (POSITION > 8)),
    "joined to the keys of others": lambda q, k: torch.cat([~future()[:, :30], torch.ones(LENGTH, 30) > 0], -1),
}


@pytest.mark.parametrize("make", NOT_CAUSAL.values(), ids=NOT_CAUSAL)
def test_queries_that_see_later_keys_stay_dense(make: Make) -> None:
    (site,) = run(by_sdpa(make), LENGTH).sites
    assert site.reason is SkipReason.NOT_CAUSAL


@pytest.mark.parametrize("batch", [1, 2])
def test_heads_merged_into_a_batch_of_any_size(batch: int) -> None:
    """BLOOM's form: ALiBi and the scale in one baddbmm of (B * H, S, D)."""

    def attend(query: Tensor, key: Tensor, value: Tensor, alibi: Tensor) -> Tensor:
        merged = [x.reshape(-1, LENGTH, 16) for x in (query, key, value)]
        scores = alibi.baddbmm(merged[0], merged[1].mT, beta=1.0, alpha=0.25).view(batch, 2, LENGTH, LENGTH)
        weights = torch.softmax(scores + hide(future()), dim=-1).view(-1, LENGTH, LENGTH)
        return torch.bmm(weights, merged[2]).view(batch, 2, LENGTH, 16)

    backend = FlexPrefillBackend()
    inputs = [*torch.randn(3, batch, 2, LENGTH, 16), torch.randn(batch * 2, 1, LENGTH)]
    with torch.no_grad(), without_code_generation():
        actual = torch.compile(attend, backend=backend, options=OPTIONS)(*inputs)
    torch.testing.assert_close(actual, attend(*inputs))
    assert backend.report.num_rewritten == 1, str(backend.report)


def test_a_mask_mod_may_read_document_ids() -> None:
    ids = POSITION // 25
    causal = create_block_mask(
        lambda b, h, q, k: (ids[q] == ids[k]) & (q >= k), 1, 1, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=16
    )
    visible = (ids[:, None] == ids) & ~future()
    backend = FlexPrefillBackend()
    query, key, value = torch.randn(3, 1, 2, LENGTH, 16)
    with torch.no_grad(), without_code_generation():
        compiled = torch.compile(partial(flex_attention, block_mask=causal), backend=backend, options=OPTIONS)
        actual = compiled(query, key, value)
    torch.testing.assert_close(actual, F.scaled_dot_product_attention(query, key, value, attn_mask=visible))
    assert backend.report.num_rewritten == 1, str(backend.report)
