"""Which attention calls are found, and why each of the others stays dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.graphs import CONFIG, find_sites, inspect_graphs, rewrite_graphs, targets
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor
from torch.torch_version import TorchVersion

from flexprefill_compile.passes.match.prefill_lengths import refuse_lengths
from flexprefill_compile.passes.sparse_prefill import find_signatures
from flexprefill_compile.report import Rewritten, Skipped, SkipReason
from flexprefill_compile.torch_internals import flex_attention_hop

LENGTH = 64


def qkv(heads: int = 4, kv_heads: int = 4, length: int = LENGTH, head_dim: int = 16, **kwargs: Any) -> list[Tensor]:
    return [torch.randn(2, n, length, head_dim, **kwargs) for n in (heads, kv_heads, kv_heads)]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize(
    "call",
    [
        causal,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, True),
        lambda q, k, v: F.scaled_dot_product_attention(value=v, query=q, key=k, is_causal=True),
        lambda q, k, v: torch.ops.aten.scaled_dot_product_attention(q, k, v, None, 0.0, True),
        lambda q, k, v: torch.ops.aten.scaled_dot_product_attention.default(q, k, v, is_causal=True, scale=0.3),
        lambda q, k, v: torch._C._nn.scaled_dot_product_attention(q, k, v, is_causal=True),
    ],
)
def test_finds_the_call_by_every_name_and_in_every_spelling(call: Callable[..., Tensor]) -> None:
    (site,) = find_sites(call, *qkv())
    assert isinstance(site, Rewritten)


MASK = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def edited_mask() -> Tensor:
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask[:, :4] = True
    return mask


@pytest.mark.parametrize(
    ("reason", "call", "inputs"),
    [
        (SkipReason.MASK_EDITED, lambda q, k, v: masked(q, k, v, edited_mask()), qkv()),
        (SkipReason.MASK_NOT_LIFTED, lambda q, k, v: masked(q, k, v, MASK.float().exp() @ MASK.float() > 1), qkv()),
        (SkipReason.NOT_CAUSAL, lambda q, k, v: masked(q, k, v, torch.arange(LENGTH)[None] < 10), qkv()),
        pytest.param(
            *(SkipReason.MASK_NOT_LIFTED, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, MASK, 0.0, True)),
            qkv(),
            marks=pytest.mark.skipif(TorchVersion(torch.__version__) >= "2.15", reason="an error of 2.15's own"),
        ),
        (SkipReason.NOT_CAUSAL, F.scaled_dot_product_attention, qkv()),
        (
            SkipReason.KERNEL_CALLED,
            lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0],
            qkv(),
        ),
        (SkipReason.DROPOUT, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.1, True), qkv()),
        (SkipReason.GRADIENT, causal, qkv(requires_grad=True)),
        (SkipReason.DECODE, causal, [torch.randn(2, 4, 1, 16), *qkv()[1:]]),
        (SkipReason.LENGTHS_DIFFER, causal, [torch.randn(2, 4, 63, 16), *qkv()[1:]]),
        (SkipReason.TOO_SHORT, causal, qkv(length=31)),
        (SkipReason.SHAPE, causal, [x[0] for x in qkv()]),
        (SkipReason.SHAPE, causal, [qkv()[0], *(x[:1] for x in qkv()[1:])]),
        (SkipReason.HEAD_DIM, causal, qkv(head_dim=8)),
        (SkipReason.DTYPE, causal, qkv(dtype=torch.float64)),
        (SkipReason.DEVICE, causal, qkv(device="meta")),
    ],
    ids=lambda value: value.name if isinstance(value, SkipReason) else "",
)
def test_each_reason_to_stay_dense(reason: SkipReason, call: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    (site,) = find_sites(call, *inputs)
    assert isinstance(site, Skipped)
    assert site.reason is reason


def test_a_tensor_subclass_stays_dense() -> None:
    (site,) = find_sites(causal, *(TwoTensor(x, x) for x in qkv()))
    assert site.reason is SkipReason.TENSOR_SUBCLASS


def test_every_reason_but_a_failed_lowering_is_covered_here() -> None:
    (mark,) = test_each_reason_to_stay_dense.pytestmark
    covered = {getattr(case, "values", case)[0] for case in mark.args[1]}  # a pytest.param has values
    elsewhere = {SkipReason.TENSOR_SUBCLASS, SkipReason.LOWERING_FAILED}
    of_other_forms = {SkipReason.UNRECOGNISED, SkipReason.WEIGHTS_USED, SkipReason.FUSED}  # test_forms.py
    of_settings = {SkipReason.DENSE_LAYER, SkipReason.KERNEL}  # test_policy.py, test_kernel_options.py
    assert covered | elsewhere | of_other_forms | of_settings == set(SkipReason)


@pytest.mark.parametrize(("kv_heads", "enable_gqa", "rewritten"), [(2, True, True), (1, True, True), (1, False, True)])
def test_heads_may_share_keys(kv_heads: int, enable_gqa: bool, rewritten: bool) -> None:
    (site,) = find_sites(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=enable_gqa),
        *qkv(kv_heads=kv_heads),
    )
    assert site.rewritten is rewritten


def test_no_grad_inside_the_model_is_enough() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            return causal(q, k, v)

    (site,) = find_sites(call, *qkv(requires_grad=True))
    assert site.rewritten


def test_matching_changes_nothing() -> None:
    def match_all(graph_module: GraphModule) -> bool:
        before = graph_module.print_readable(print_output=False)
        assert len(find_signatures(graph_module, CONFIG)) == 1
        return graph_module.print_readable(print_output=False) == before

    assert inspect_graphs(match_all, causal, *qkv()) == [True]


def test_child_graph_modules_are_searched() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(causal, q, k, v, use_reentrant=False)

    (graph_module,), (site,) = rewrite_graphs(call, *qkv())
    assert site.rewritten
    assert flex_attention_hop in targets(graph_module)
    assert flex_attention_hop not in [node.target for node in graph_module.graph.nodes]


def test_the_name_is_the_place_in_the_model() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return causal(x, x, x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Attention(), Attention()])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    names = [site.name for site in find_sites(Model(), qkv()[0])]
    assert names == ["layers.0", "layers.1"]
    assert all(isinstance(Model().get_submodule(name), Attention) for name in names)


def test_a_symbolic_scale_and_a_length_dependent_scale_are_accepted() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1 / q.shape[-2])

    (site,) = find_sites(call, *qkv(), dynamic=True)
    assert site.rewritten


def test_lengths_of_different_symbols_are_guarded_equal() -> None:
    inputs = qkv()
    for x in inputs:
        torch._dynamo.mark_dynamic(x, 2)
    (site,) = find_sites(causal, *inputs)
    assert site.rewritten


def test_a_length_that_depends_on_data_stays_dense_without_a_guard() -> None:
    shape_env = ShapeEnv()
    length = shape_env.create_unbacked_symint()
    assert refuse_lengths(length, length, CONFIG, is_causal=True) == (SkipReason.TOO_SHORT, f"{length} < 32")
    other = shape_env.create_unbacked_symint()
    assert refuse_lengths(length, other, CONFIG, is_causal=True) == (
        SkipReason.LENGTHS_DIFFER,
        f"{length} queries, {other} keys",
    )
    assert not shape_env.guards


def test_lengths_that_are_known_add_no_guard() -> None:
    shape_env = ShapeEnv()
    length = shape_env.create_unbacked_symint()
    torch._check(length >= 32)
    assert refuse_lengths(length, length, CONFIG, is_causal=True) is None
    assert not shape_env.guards


def test_one_head_written_out_on_matrices_has_a_line() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.mm(q[0, 0], k[0, 0].T) / 4
        return scores.masked_fill(~MASK, -torch.inf).softmax(-1) @ v[0, 0]

    (site,) = find_sites(attend, *qkv())
    assert (site.reason, site.detail) == (SkipReason.UNRECOGNISED, "no batch and no heads")


def test_a_mixture_by_parameters_is_no_attention() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.values = nn.Parameter(torch.randn(16, 4)), nn.Parameter(torch.randn(4, 16))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.router).softmax(-1) @ self.values

    assert find_sites(Mixture().requires_grad_(False), torch.randn(LENGTH, 16)) == []


def test_a_softmax_that_minds_rows_without_keys_is_one() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.aten._safe_softmax((q @ k.mT / 4).masked_fill(~MASK, -torch.inf), -1) @ v

    (site,) = find_sites(attend, *qkv())
    assert isinstance(site, Rewritten)
