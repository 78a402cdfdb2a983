"""Sinks take their share of the softmax, in the form for a CPU and in that for a GPU."""

from __future__ import annotations

import pytest
import torch
from helpers.checked_attention import without_code_generation
from helpers.models import OPTIONS, relative_error
from helpers.zoo.models import FAMILIES, VOCABULARY, build_model
from torch import Tensor
from torch.nn import functional as F

import flexprefill_compile.passes.rewrite.attention as rewrite
from flexprefill_compile import audit
from flexprefill_compile.backend import FlexPrefillBackend

HEADS, LENGTH, HEAD_DIM = 4, 150, 16
SINKS = torch.tensor([-3.0, 0.0, 2.0, 5.0])


def attend(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, mask: Tensor) -> Tensor:
    logits = query @ key.mT * 0.25 + mask
    joined = torch.cat([logits, sinks.reshape(1, -1, 1, 1).expand(*logits.shape[:-1], 1)], dim=-1)
    return F.softmax(joined, dim=-1)[..., :-1].to(value.dtype) @ value


def attend_causally(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, padding: Tensor | None) -> Tensor:
    length = query.shape[2]
    visible = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    if padding is not None:
        visible = visible & padding[:, None, None]
    mask = torch.zeros(1, dtype=query.dtype).masked_fill(~visible, torch.finfo(query.dtype).min)
    return attend(query, key, value, sinks, mask)


@pytest.mark.parametrize("is_key", [True, False], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_sinks_are_those_of_the_model(
    is_key: bool, padded: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewrite, "are_keys", lambda device: is_key)
    query, key, value = torch.randn(3, 2, HEADS, LENGTH, HEAD_DIM).to(dtype)
    padding = (torch.arange(LENGTH) >= torch.tensor([[0], [40]])) if padded else None
    backend = FlexPrefillBackend()
    compiled = torch.compile(attend_causally, backend=backend, options=OPTIONS | {"gamma": 1.0})
    with without_code_generation(), torch.no_grad():
        output = compiled(query, key, value, SINKS, padding)
    assert backend.report.num_rewritten == 1
    expected = attend_causally(query.double(), key.double(), value.double(), SINKS.double(), padding)
    real = torch.ones(2, LENGTH, dtype=torch.bool) if padding is None else padding
    error = relative_error(output.transpose(1, 2)[real], expected.transpose(1, 2)[real])
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)


def test_both_forms_agree_where_blocks_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = torch.randn(3, 1, HEADS, LENGTH, HEAD_DIM) * torch.tensor([4.0, 4.0, 1.0]).view(3, 1, 1, 1, 1)
    outputs = []
    for is_key in (True, False):
        monkeypatch.setattr(rewrite, "are_keys", lambda device, is_key=is_key: is_key)
        torch.compiler.reset()
        compiled = torch.compile(attend_causally, backend=FlexPrefillBackend(), options=OPTIONS | {"gamma": 0.6})
        with without_code_generation(is_dense=False), torch.no_grad():
            outputs.append(compiled(query, key, value, SINKS, None))
    torch.testing.assert_close(*outputs)
    assert relative_error(outputs[0], attend_causally(query, key, value, SINKS, None).double()) > 1e-3


@pytest.mark.parametrize("is_key", [True, False], ids=["as on a CPU", "as on a GPU"])
def test_an_audit_counts_the_share_of_sinks(is_key: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "are_keys", lambda device: is_key)
    tokens = torch.randint(3, VOCABULARY, (1, LENGTH))
    with without_code_generation():
        report = audit(build_model(FAMILIES["gpt_oss"]), tokens, options=OPTIONS | {"gamma": 1.0})
    assert len(report.calls) == 2
    assert max(head.error for call in report.calls for head in call.heads) < 1e-5
