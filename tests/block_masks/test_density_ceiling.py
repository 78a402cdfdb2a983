"""Attention that turns out not to be sparse runs dense: the choice, its two ways, and where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.graphs import CONFIG, inspect_graphs, targets
from helpers.models import OPTIONS, causal_attention, relative_error
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from flexprefill_compile.backend import FlexPrefillBackend
from flexprefill_compile.passes.sparse_prefill import SparsePrefillPass
from flexprefill_compile.settings import device_defaults
from flexprefill_compile.settings.config import DensityCeiling, SparsePrefillConfig
from flexprefill_compile.settings.device_defaults import resolve_ceiling, resolve_min_length

is_sparse = torch.ops.flexprefill.is_sparse
attend_densely = torch.ops.flexprefill.attend_densely
cond = torch.ops.higher_order.cond


def inputs_of(length: int, *, spread: float) -> list[Tensor]:
    """Return random inputs, or, with a spread of 0 between keys but for the first, ones that need a block a row."""
    query, key, value = (torch.randn(1, heads, length, 16) for heads in (4, 2, 2))
    key *= spread
    key[:, :, 0] += 1 - spread
    return [query if spread else query.abs() * 10, key, value]


@pytest.fixture(scope="module")
def compiled() -> Any:
    options = OPTIONS | {"estimator": "flexprefill", "gamma": 0.9, "max_density": 0.5}
    return torch.compile(causal_attention, backend=FlexPrefillBackend(), dynamic=True, options=options)


@pytest.mark.parametrize("length", [333, 512])
def test_it_chooses_for_each_call_in_one_graph(compiled: Any, length: int) -> None:
    with torch.no_grad():
        scattered = inputs_of(length, spread=1)
        assert torch.equal(compiled(*scattered), causal_attention(*scattered))
        sparse = inputs_of(length, spread=0)
        error = relative_error(compiled(*sparse), causal_attention(*sparse).double())
        assert 0 < error < 0.1  # the sparse way, and right


def test_counts_decide() -> None:
    diagonal = torch.ones(1, 2, 4, dtype=torch.int32)
    full = torch.tensor([0, 1, 1, 0], dtype=torch.int32).expand(1, 2, 4)  # of 10 causal blocks a head computes 6
    assert is_sparse(diagonal, full, 512, 0.6, 1)
    assert not is_sparse(diagonal, full, 512, 0.59, 1)
    assert is_sparse(diagonal, full, 512, 0.59, 513)  # too short to ask
    torch.library.opcheck(is_sparse.default, (diagonal, full, 512, 0.6, 1))


@pytest.mark.parametrize("layout", ["heads first", "tokens first", "one projection"])
def test_dense_attention_has_the_layout_of_flex_attention(layout: str) -> None:
    query, key, value = (torch.randn(2, heads, 40, 16) for heads in (4, 2, 2))
    if layout == "tokens first":
        query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value))
    elif layout == "one projection":
        query, key, value = torch.randn(2, 40, 8, 16).transpose(1, 2).split([4, 2, 2], dim=1)
    torch.library.opcheck(attend_densely.default, (query, key, value, 0.25))
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attend_densely(query, key, value, 0.25), expected)


def graphs_under(ceiling: DensityCeiling, call: Any, *inputs: Tensor) -> list[Any]:
    """Return the targets of the rewritten graph."""

    def rewrite(graph_module: torch.fx.GraphModule) -> list[Any]:
        SparsePrefillPass(CONFIG, {}, ceiling)(graph_module)
        return targets(graph_module)

    return inspect_graphs(rewrite, call, *inputs)[0]


@pytest.mark.parametrize("binds_flash", [False, True])
def test_flash_has_a_ceiling_only_if_asked(binds_flash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    options = "flexprefill_compile.passes.rewrite.attention.choose_kernel_options"
    monkeypatch.setattr(options, lambda *_, **__: {"BACKEND": "FLASH"})
    with torch.no_grad():
        found = graphs_under(DensityCeiling(0.5, 1, binds_flash), causal_attention, *inputs_of(64, spread=1))
    assert (cond in found) == binds_flash


def test_only_plain_causal_attention_has_a_dense_way() -> None:
    ceiling = DensityCeiling(0.5, 1)
    inputs = inputs_of(64, spread=1)

    def attend_in_a_window(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        position = torch.arange(64)
        distance = position[:, None] - position
        mask = (distance >= 0) & (distance < 20)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)

    with torch.no_grad():
        assert cond in graphs_under(ceiling, causal_attention, *inputs)
        assert cond not in graphs_under(ceiling, attend_in_a_window, *inputs)


def test_what_cannot_be_lowered_is_tried_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise NotImplementedError("no branches here")

    monkeypatch.setattr("flexprefill_compile.passes.rewrite.attention.insert_branches", fail)
    backend = FlexPrefillBackend()
    sparse = torch.compile(causal_attention, backend=backend, options=OPTIONS | {"gamma": 0.5, "max_density": 0.01})
    inputs = inputs_of(333, spread=1)
    with torch.no_grad():
        assert not torch.equal(sparse(*inputs), causal_attention(*inputs))
    assert backend.report.num_rewritten == 1


def test_caches_hold_both_ways_and_tell_them_apart() -> None:
    inputs = inputs_of(333, spread=1)

    def is_hit(**kernel_options: int) -> bool:
        torch.compiler.reset()
        counters.clear()
        options = OPTIONS | {"max_density": 0.5, "kernel_options": kernel_options}
        with torch.no_grad():
            torch.compile(causal_attention, backend=FlexPrefillBackend(), options=options)(*inputs)
        return bool(counters["aot_autograd"]["autograd_cache_hit"] and counters["inductor"]["fxgraph_cache_hit"])

    with fresh_cache():
        assert [is_hit(), is_hit(), is_hit(BLOCK_M=16)] == [False, True, False]


@pytest.fixture
def gpu_input(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """A tensor on an H200, as the backend sees one."""
    monkeypatch.setattr(
        device_defaults, "name_device", lambda device: "NVIDIA H200" if device.type == "cuda" else "cpu"
    )
    monkeypatch.setattr(device_defaults, "read_break_even_lengths", dict)
    with FakeTensorMode():
        return torch.empty(1, device="cuda")


def test_long_prompts_on_a_gpu_have_one_unless_told(gpu_input: Tensor) -> None:
    def settle(has_cuda_graphs: bool = False, **options: Any) -> DensityCeiling | None:
        return resolve_ceiling(SparsePrefillConfig(**options), [gpu_input], has_cuda_graphs=has_cuda_graphs)

    length = device_defaults.CEILING_FROM["NVIDIA H200"]
    assert settle() == DensityCeiling(device_defaults.GPU_MAX_DENSITY, length, binds_flash=False)
    assert settle(max_density=0.4) == DensityCeiling(0.4, 1)
    assert settle(max_density=1) is None
    assert settle(gamma=1) is None
    assert settle(has_cuda_graphs=True) is None
    assert settle(has_cuda_graphs=True, max_density=0.4) is None
    assert resolve_ceiling(SparsePrefillConfig(), [torch.empty(1)], has_cuda_graphs=False) is None


def test_a_ceiling_that_was_asked_for_starts_where_it_is_free(gpu_input: Tensor) -> None:
    def min_length(**options: Any) -> int | None:
        return resolve_min_length(SparsePrefillConfig(**options), [gpu_input]).min_length

    assert min_length() == device_defaults.MEASURED["NVIDIA H200"]
    assert min_length(max_density=0.4) == device_defaults.CEILING_FROM["NVIDIA H200"]
    assert min_length(max_density=0.4, min_length=99) == 99
