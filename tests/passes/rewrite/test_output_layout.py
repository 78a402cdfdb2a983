"""The output of a rewritten attention lies in memory as eager's does: views of it work."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.checked_attention import without_code_generation
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from flexprefill_compile.backend import FlexPrefillBackend

LENGTH, BLOCK = 100, 32
MASK = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_is_causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def by_mask(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def by_math(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return by_is_causal(query, key, value)


def written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    return scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1) == 1, -torch.inf).softmax(-1) @ value


FLEX_MASK = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=BLOCK)


def by_flex(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return flex_attention(query, key, value, block_mask=FLEX_MASK, enable_gqa=True)  # type: ignore[return-value]


FORMS = (by_is_causal, by_mask, by_math, written_out, by_flex)
LAYOUTS: dict[str, Callable[[int, int], Tensor]] = {
    "BHSD": lambda heads, dim: torch.randn(2, heads, LENGTH, dim),
    "BSHD": lambda heads, dim: torch.randn(2, LENGTH, heads, dim).transpose(1, 2),
    "SBHD": lambda heads, dim: torch.randn(LENGTH, 2, heads, dim).permute(1, 2, 0, 3),
    "HBSD": lambda heads, dim: torch.randn(heads, 2, LENGTH, dim).transpose(0, 1),
    "BHDS": lambda heads, dim: torch.randn(2, heads, dim, LENGTH).mT,
}


def compile_at_gamma_1(attend: Attend, *, dynamic: bool = False) -> tuple[Attend, FlexPrefillBackend]:
    backend = FlexPrefillBackend()
    options = {"gamma": 1.0, "block_size": BLOCK, "min_length": 64}
    return torch.compile(attend, backend=backend, options=options, dynamic=dynamic), backend


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("value_dim", [16, 32])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attend", FORMS)
@torch.no_grad()
def test_strides_are_those_of_eager(attend: Attend, layout: str, value_dim: int, dynamic: bool) -> None:
    query, key, value = LAYOUTS[layout](4, 16), LAYOUTS[layout](2, 16), LAYOUTS[layout](2, value_dim)
    expected = attend(query, key, value)
    compiled, backend = compile_at_gamma_1(attend, dynamic=dynamic)
    with without_code_generation():
        actual = compiled(query, key, value)
    assert backend.report.num_rewritten == 1, str(backend.report)
    assert actual.stride() == expected.stride()
    torch.testing.assert_close(actual, expected)


@torch.no_grad()
def test_a_view_in_the_graph_works() -> None:
    def attend_and_view(x: Tensor) -> Tensor:
        return by_is_causal(x, x, x).transpose(1, 2).view(2, LENGTH, 64)

    x = LAYOUTS["BSHD"](4, 16)
    compiled, backend = compile_at_gamma_1(attend_and_view)  # type: ignore[arg-type]
    torch.testing.assert_close(compiled(x), attend_and_view(x))  # type: ignore[call-arg]
    assert backend.report.num_rewritten == 1, str(backend.report)
