"""A deferred mask is a tensor to everyone who reads it as one."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from flexprefill_compile.integrations.transformers.deferred_mask import DeferredMask
from flexprefill_compile.integrations.transformers.masks import defer_mask

LENGTH = 20
PADDING = torch.arange(LENGTH) >= torch.tensor([[0], [5]])


def make(**kwargs: object) -> Tensor | None:
    sizes = {"batch_size": 2, "q_length": LENGTH, "kv_length": LENGTH, "mask_function": causal_mask_function}
    return defer_mask(**{**sizes, "attention_mask": PADDING, **kwargs})  # type: ignore[arg-type]


def make_dense(**kwargs: object) -> Tensor:
    sizes = {"batch_size": 2, "q_length": LENGTH, "kv_length": LENGTH, "mask_function": causal_mask_function}
    mask: Tensor = sdpa_mask(**{**sizes, "attention_mask": PADDING, **kwargs})
    return mask


def test_metadata_needs_no_elements() -> None:
    mask = make()
    assert isinstance(mask, DeferredMask)
    assert mask.shape == (2, 1, LENGTH, LENGTH)
    assert mask.dtype == torch.bool
    assert mask.contiguous() is mask
    assert "DeferredMask" in repr(mask)
    assert mask._made is None


def test_what_reads_it_gets_the_mask() -> None:
    mask, expected = make(), make_dense()
    assert mask is not None
    assert torch.equal(mask[:, :, :, 3:], expected[:, :, :, 3:])
    assert torch.equal(~mask, ~expected)
    assert torch.equal(torch.where(mask, 0.0, -1.0), torch.where(expected, 0.0, -1.0))
    assert torch.equal(mask.to(torch.float32), expected.float())


def test_nothing_is_deferred_where_there_is_no_mask_or_one_row() -> None:
    assert make(attention_mask=None) is None
    assert make(attention_mask=torch.ones(2, LENGTH, dtype=torch.bool)) is None
    step = make(q_length=1, q_offset=LENGTH - 1)
    assert type(step) is Tensor
    assert torch.equal(step, make_dense(q_length=1, q_offset=LENGTH - 1))


def test_a_position_that_moves_later_is_kept() -> None:
    position = torch.tensor(4)
    mask = make(q_length=8, q_offset=position)
    position.add_(100)
    assert mask is not None
    assert torch.equal(mask & True, make_dense(q_length=8, q_offset=4))
