"""The bugs that ``cpu_workarounds.py`` gets round are still there. A test that fails here says: that one can go."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.models import OPTIONS, TwoLayers, causal_attention, relative_error
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.fx import Node
from torch.torch_version import TorchVersion

import flexprefill_compile.backend as backend_module
from flexprefill_compile import SkipReason
from flexprefill_compile.backend import FlexPrefillBackend
from flexprefill_compile.passes.rewrite import attention as rewrite_attention
from flexprefill_compile.passes.rewrite.cpu_workarounds import KEEP_NAN, TEMPLATE_REPAIRS
from flexprefill_compile.torch_internals import cpp_flex_attention_template

EXACT: dict[str, Any] = OPTIONS | {"gamma": 1.0}


class Projected(nn.Module):
    """Attention of views of Linears' outputs, one for all or one for each, then a pointwise consumer."""

    def __init__(self, is_fused: bool, consume: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.widths = [64, 32, 32]
        self.projections = nn.ModuleList(nn.Linear(64, width) for width in ([128] if is_fused else self.widths))
        self.consume = consume
        self.project_out = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        parts = [project(x) for project in self.projections]
        if len(parts) == 1:
            parts = parts[0].split(self.widths, -1)
        attended = causal_attention(*(part.unflatten(-1, (-1, 16)).transpose(1, 2) for part in parts))
        return self.project_out(self.consume(attended).transpose(1, 2).flatten(-2))


@pytest.mark.parametrize(
    ("is_fused", "consume"),
    [
        pytest.param(
            False,
            nn.Identity(),
            marks=pytest.mark.skipif(TorchVersion(torch.__version__) < "2.13", reason="a bug of 2.13"),
            id="views of Linears",
        ),
        pytest.param(True, torch.relu, id="pointwise consumer"),
    ],
)
def test_1_neither_lowers_without_a_copy(
    is_fused: bool, consume: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave_as_it_is(insert: Callable[..., Node], x: Node, device: torch.device) -> Node:
        return x

    model, x = Projected(is_fused, consume).eval(), torch.randn(2, 100, 64)
    for is_repaired in (False, True):
        torch.compiler.reset()
        if not is_repaired:
            monkeypatch.setattr(rewrite_attention, "realize_on_cpu", leave_as_it_is)
        backend = FlexPrefillBackend()
        with torch.no_grad(), fresh_cache():
            torch.compile(model, backend=backend, options=EXACT)(x)
        monkeypatch.undo()
        assert backend.report.sites[0].reason is (None if is_repaired else SkipReason.LOWERING_FAILED)


def test_2_the_template_multiplies_float32_one_score_at_a_time() -> None:
    source = inspect.getsource(cpp_flex_attention_template())
    assert "_kernel_micro_gemm_transpose_b<static_cast<bool>(false)>(" in source
    assert "GemmBlocking(1, 16, 1)" in source


@pytest.mark.parametrize("head_dim", [16, 17, 40])
def test_2_the_repaired_product_is_generated_and_right(head_dim: int) -> None:
    inputs = [torch.randn(2, n, 333, head_dim) for n in (4, 2, 2)]
    compiled = torch.compile(causal_attention, backend="flexprefill", options=EXACT)
    with torch.no_grad(), fresh_cache():
        actual, code = run_and_get_code(compiled, *inputs)
        assert relative_error(actual, causal_attention(*inputs).double()) < 1e-6
    assert "at::vec::transpose_mxn<float, TILE, TILE>" in "".join(code)


def test_the_template_is_repaired_only_while_our_graphs_compile() -> None:
    template = cpp_flex_attention_template().CppFlexAttentionTemplate
    methods = {name: getattr(template, name) for name in TEMPLATE_REPAIRS}
    with torch.no_grad():
        torch.compile(causal_attention, backend="flexprefill", options=EXACT)(*[torch.randn(1, 2, 100, 16)] * 3)
    assert {name: getattr(template, name) for name in TEMPLATE_REPAIRS} == methods


def test_3_the_template_loses_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def repair_nothing() -> Iterator[None]:
        yield

    query, key, value = (torch.randn(1, 2, 100, 16) for _ in range(3))
    query[0, 0, 40] = torch.nan
    compiled = torch.compile(causal_attention, backend="flexprefill", options=EXACT)
    with torch.no_grad(), fresh_cache():
        monkeypatch.setattr(backend_module, "repaired_cpu_template", repair_nothing)
        assert compiled(query, key, value).isfinite().all()
        monkeypatch.undo()
        torch.compiler.reset()
        repaired, code = run_and_get_code(compiled, query, key, value)
    assert repaired[0, 0, 40].isnan().all()
    assert all(replacement in "".join(code) for replacement in KEEP_NAN.values())


def padded_attention(query: Tensor, key: Tensor, value: Tensor, is_token: Tensor) -> Tensor:
    position = torch.arange(query.shape[2])
    mask = (position <= position[:, None]) & is_token[:, None, None, :]
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize("is_repaired", [False, True])
def test_4_captures_of_symbolic_size_do_not_compile(is_repaired: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_repaired:
        monkeypatch.delitem(TEMPLATE_REPAIRS, "__init__")
    backend = FlexPrefillBackend()
    compiled = torch.compile(padded_attention, backend=backend, options=EXACT, dynamic=True)
    with torch.no_grad(), fresh_cache():
        for length in (100, 131) if is_repaired else (100,):
            inputs = [torch.randn(2, heads, length, 16) for heads in (4, 2, 2)]
            is_token = torch.arange(length) >= torch.tensor([[30], [0]])
            actual, expected = (function(*inputs, is_token)[1] for function in (compiled, padded_attention))
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert backend.report.sites[0].reason is (None if is_repaired else SkipReason.LOWERING_FAILED)


def test_5_the_template_replaces_names_wherever_they_stand() -> None:
    template = cpp_flex_attention_template().CppFlexAttentionTemplate
    source = inspect.getsource(template.modification)
    assert "output_code.replace(" in source
    assert 'args.sizevars[name] = f"k{name}"' in source, "the repair's names don't go this way any more"


@pytest.mark.parametrize("is_repaired", [False, True])
def test_6_layers_that_are_alike_share_a_kernel(is_repaired: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_repaired:
        monkeypatch.delitem(TEMPLATE_REPAIRS, "__init__")
    compiled = torch.compile(TwoLayers().eval(), backend="flexprefill", options=EXACT)
    with torch.no_grad(), fresh_cache():
        _, code = run_and_get_code(compiled, torch.randn(1, 100, 64))
    kernels = re.findall(r"^(cpp_\w*flex_attention\w*) = async_compile", "".join(code), re.MULTILINE)
    assert len(kernels) == (1 if is_repaired else 2)
