"""A mask without a formula, or whose formula is not causal, stays dense with the reason."""

from __future__ import annotations

import pytest
import torch
from helpers.graphs import find_sites
from helpers.lifting.lifted_masks import (
    BATCH,
    CONFIG,
    HEADS,
    LENGTH,
    PAD,
    Make,
    additive,
    attend,
    causal,
    pad_of,
    positions,
    square,
)
from torch import Tensor

from flexprefill_compile.report import SkipReason


def edited(x: Tensor) -> Tensor:
    mask = square(x).bool().tril()
    mask[:, :4] = True
    return mask


def edited_through_a_view(x: Tensor) -> Tensor:
    mask = square(x).bool().tril()
    mask.view(-1)[:4].logical_not_()
    return mask


def multiplied_in_place(x: Tensor, pad: Tensor) -> Tensor:
    mask = (square(x).tril() == 0) * -1e9
    mask = mask[None, None].expand(x.shape[0], -1, -1, -1).clone()
    mask *= pad[:, None, None, :]
    return mask


@pytest.mark.parametrize(
    ("make", "inputs", "reason"),
    [
        (edited, (), SkipReason.MASK_EDITED),
        (edited_through_a_view, (), SkipReason.MASK_EDITED),
        (multiplied_in_place, (PAD,), SkipReason.MASK_EDITED),
        (lambda x: (square(x).tril() @ square(x)) > 0, (), SkipReason.MASK_NOT_LIFTED),
        (lambda x: causal(x) & causal(x).any(-1, keepdim=True), (), SkipReason.MASK_NOT_LIFTED),
        (lambda x, mask: mask, (torch.ones(LENGTH, LENGTH).tril().bool().repeat(10, 10)[:480, :480],), None),
        (lambda x, pad: pad_of(x, pad).expand(-1, -1, x.shape[2], -1), (PAD,), SkipReason.NOT_CAUSAL),
        (lambda x: causal(x) | (positions(x)[1] < 4), (), SkipReason.NOT_CAUSAL),
        (lambda x: additive(causal(x), -1e9), (), SkipReason.NOT_CAUSAL),
    ],
)
def test_what_is_no_formula_stays_dense_with_the_reason(
    make: Make, inputs: tuple[Tensor, ...], reason: SkipReason | None
) -> None:
    if reason is None:  # a mask that is given, of more elements than max_mask_elements
        x = torch.randn(1, 1, 480, 16)
        (site,) = find_sites(attend(make), x, *inputs, config=CONFIG)
        assert site.reason is SkipReason.MASK_NOT_LIFTED
        assert "230400 elements, more than 100000" in site.detail
        return
    (site,) = find_sites(attend(make), torch.randn(BATCH, HEADS, LENGTH, 16), *inputs, config=CONFIG)
    assert site.reason is reason
