"""explain: a line for each attention call, with its place and its outcome."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.models import OPTIONS, SelfAttention, TwoLayers, causal_attention
from torch import Tensor, nn

from flexprefill_compile import InvalidOptionError, SkipReason, explain, sparse_prefill


class SparseThenMasked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = SelfAttention()

    def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
        q = self.first(x).unflatten(-1, (4, 16)).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)


def test_it_prints_and_returns_a_line_for_each_call(capsys: pytest.CaptureFixture[str]) -> None:
    mask = torch.ones(100, 100, dtype=torch.bool)
    with torch.no_grad():
        report = explain(
            SparseThenMasked().eval(), torch.randn(1, 100, 64), mask=mask, options=OPTIONS | {"max_mask_elements": 0}
        )
    assert [(site.rewritten, site.reason) for site in report.sites] == [
        (True, None),
        (False, SkipReason.MASK_NOT_LIFTED),
    ]
    assert report.sites[0].name == "first"
    table = str(report)
    assert capsys.readouterr().out == table + "\n"
    lines = table.splitlines()
    assert lines[2].split() == ["first", "1x4x100x16", "1x2x100x16", "float32", "rewritten"]
    assert "dense: its mask is no formula of query and key" in lines[3]
    assert lines[-1] == "1 of 2 attention calls rewritten"


def test_a_model_compiled_before_is_explained_too() -> None:
    x = torch.randn(1, 100, 64)
    with torch.no_grad():
        by_wrapper = torch.compile(TwoLayers().eval(), backend="flexprefill", options=OPTIONS)
        by_wrapper(x)
        assert explain(by_wrapper, x, options=OPTIONS).num_rewritten == 2
        in_place = TwoLayers().eval()
        in_place.compile(backend="flexprefill", options=OPTIONS)
        in_place(x)
        assert explain(in_place, x, options=OPTIONS).num_rewritten == 2


def test_it_looks_at_inference_unless_told_otherwise() -> None:
    x = torch.randn(1, 4, 100, 16, requires_grad=True)
    assert explain(causal_attention, x, x, x, options=OPTIONS).num_rewritten == 1
    assert "use torch.no_grad()" in str(explain(causal_attention, x, x, x, options=OPTIONS, autograd=True))


def compile_in_place(options: dict[str, Any]) -> nn.Module:
    model = TwoLayers().eval()
    model.compile(backend="flexprefill", options=options)
    return model


def decorate_class(options: dict[str, Any]) -> nn.Module:
    class Decorated(TwoLayers):
        pass

    return sparse_prefill(**options)(Decorated)().eval()


WAYS: dict[str, Callable[[dict[str, Any]], Callable[..., Any]]] = {
    "wrapped": lambda options: torch.compile(TwoLayers().eval(), backend="flexprefill", options=options),
    "in place": compile_in_place,
    "decorated module": lambda options: sparse_prefill(**options)(TwoLayers().eval()),
    "decorated class": decorate_class,
}


@pytest.mark.parametrize("way", WAYS)
def test_options_of_the_models_own_are_used(way: str) -> None:
    model, x = WAYS[way](OPTIONS | {"dense_layers": (1,)}), torch.randn(1, 100, 64)
    assert [site.reason for site in explain(model, x).sites] == [None, SkipReason.DENSE_LAYER]
    assert explain(model, x, options=OPTIONS).num_rewritten == 2


def test_options_of_a_decorated_function_are_used_and_those_of_another_backend_are_not() -> None:
    x = torch.randn(1, 4, 100, 16)
    assert explain(sparse_prefill(**OPTIONS)(causal_attention), x, x, x).num_rewritten == 1
    other = torch.compile(causal_attention, backend="inductor", options={"max_autotune": False})
    assert [site.reason for site in explain(other, x, x, x).sites] == [SkipReason.TOO_SHORT]


def test_no_attention_and_bad_options() -> None:
    assert str(explain(torch.relu, torch.ones(3))) == "no attention was compiled"
    with pytest.raises(InvalidOptionError, match=r"tau must be in \[0, 1\], got 2"):
        explain(torch.relu, torch.ones(3), options={"tau": 2})
