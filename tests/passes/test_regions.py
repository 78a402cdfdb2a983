"""Masked attention inside regions, through inductor: rewritten, and equal to eager."""

from __future__ import annotations

import pytest
import torch
from helpers.models import OPTIONS, relative_error
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from flexprefill_compile.backend import FlexPrefillBackend

LENGTH = 100
REGIONS = ("autocast", "sdpa_kernel", "no_grad", "checkpoint")  # a checkpoint is a child graph, reported last


def hide_padding(is_token: Tensor) -> Tensor:
    position = torch.arange(LENGTH)
    return (position <= position[:, None]) & is_token[:, None, None, :]


def attend(query: Tensor, key: Tensor, value: Tensor, is_token: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=hide_padding(is_token))


def write_out(query: Tensor, key: Tensor, value: Tensor, is_token: Tensor) -> Tensor:
    scores = (query @ key.transpose(-2, -1) / 4).masked_fill(~hide_padding(is_token), -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def attend_in_regions(query: Tensor, key: Tensor, value: Tensor, is_token: Tensor) -> tuple[Tensor, ...]:
    """Attention in each of REGIONS, in one graph. One mask is built outside its region."""
    mask = hide_padding(is_token)
    with torch.autocast("cpu", torch.bfloat16):
        in_autocast = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    with sdpa_kernel(SDPBackend.MATH):
        in_sdpa_kernel = attend(query, key, value, is_token)
    in_checkpoint = checkpoint(write_out, query, key, value, is_token, use_reentrant=False)
    with torch.no_grad():
        in_no_grad = write_out(query, key, value, is_token)
    return in_autocast, in_sdpa_kernel, in_no_grad, in_checkpoint


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[bool, Tensor, Tensor]]:
    """By region: whether its attention was rewritten, its output and eager's; all inside inference_mode."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 2, LENGTH, 16) for _ in range(3)]
    is_token = torch.arange(LENGTH) >= torch.tensor([[30], [0]])
    backend = FlexPrefillBackend()
    compiled = torch.compile(attend_in_regions, backend=backend, options=OPTIONS | {"gamma": 1.0})
    with torch.inference_mode():
        actual, expected = (function(*inputs, is_token) for function in (compiled, attend_in_regions))
    rewritten = [site.rewritten for site in backend.report.sites]
    return dict(zip(REGIONS, zip(rewritten, actual, expected, strict=True), strict=True))


@pytest.mark.parametrize("region", REGIONS)
def test_masked_attention_inside_a_region_runs_sparse(
    region: str, outcomes: dict[str, tuple[bool, Tensor, Tensor]]
) -> None:
    rewritten, actual, expected = outcomes[region]
    assert rewritten
    assert actual.dtype == expected.dtype == (torch.bfloat16 if region == "autocast" else torch.float32)
    # The first prompt's padding comes first, and rows of padding mean nothing.
    actual, expected = (torch.cat([x[0, :, 30:], x[1]], dim=-2) for x in (actual, expected))
    assert relative_error(actual, expected.double()) < (2**-7 if region == "autocast" else 1e-5)
