"""Captured sizes that are computed from others, through inductor: C++ has no name for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flexprefill_compile.backend import FlexPrefillBackend

Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def by_lengths(query: Tensor, key: Tensor, value: Tensor, start: int) -> Tensor:
    shape = query.shape[2], key.shape[2]
    mask = torch.ones(shape, dtype=torch.bool).tril(diagonal=shape[1] - shape[0])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def by_start(query: Tensor, key: Tensor, value: Tensor, start: int) -> Tensor:
    hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(diagonal=start + 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=~hidden)


def by_blocks(query: Tensor, key: Tensor, value: Tensor, start: int) -> Tensor:
    own = torch.triu(torch.full((query.shape[2], query.shape[2]), -torch.inf), diagonal=1)
    mask = torch.hstack([torch.zeros((query.shape[2], start)), own])
    return torch.softmax(query @ key.mT / 4 + mask, dim=-1) @ value


@pytest.mark.parametrize("attend", [by_lengths, by_start, by_blocks])
def test_the_offset_of_a_chunk_may_be_an_expression(attend: Attend) -> None:
    backend = FlexPrefillBackend()
    options = {"gamma": 1.0, "min_length": 64, "block_size": 32}
    compiled = torch.compile(attend, backend=backend, options=options, dynamic=True)
    for length, start in ((100, 50), (110, 70)):
        query, key, value = torch.randn(1, 2, length, 16), *torch.randn(2, 1, 2, length + start, 16)
        with torch.no_grad():
            torch.testing.assert_close(compiled(query, key, value, start), attend(query, key, value, start))
    assert backend.report.num_rewritten == len(backend.report.sites), str(backend.report)
