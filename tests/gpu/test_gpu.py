"""What only a GPU can show. Run with: pytest -m gpu."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.models import TwoLayers, attend_in_float64, causal_attention, relative_error
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from flexprefill_compile import SparsePrefillConfig
from flexprefill_compile.backend import FlexPrefillBackend
from flexprefill_compile.block_masks import prefill
from flexprefill_compile.block_masks.prefill import select_prefill_blocks, select_prefill_tables

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def random_inputs(heads: int, kv_heads: int, length: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(2, n, length, head_dim, device="cuda", dtype=dtype) for n in (heads, kv_heads, kv_heads)]


@pytest.fixture
def forbid_syncs() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("head_dim", "dtype", "block_size"),
    [
        (16, torch.float32, 128),
        (64, torch.bfloat16, 128),
        (80, torch.float16, 128),
        (128, torch.bfloat16, 16),
        (128, torch.bfloat16, 64),
        (128, torch.bfloat16, 512),
        (256, torch.bfloat16, 64),
        (256, torch.bfloat16, 128),
        (256, torch.float32, 64),
        (256, torch.float32, 128),
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_gamma_1_equals_dense(head_dim: int, dtype: torch.dtype, block_size: int, dynamic: bool) -> None:
    inputs = random_inputs(8, 2, 777, head_dim, dtype)
    backend = FlexPrefillBackend()
    options: dict[str, Any] = {"gamma": 1.0, "min_length": 64, "block_size": block_size}
    with torch.no_grad():
        actual = torch.compile(causal_attention, backend=backend, dynamic=dynamic, options=options)(*inputs)
    assert backend.report.num_rewritten == 1, str(backend.report)
    causal = torch.ones(777, 777, dtype=torch.bool, device="cuda").tril()
    exact = attend_in_float64(*inputs, causal)
    allowed = 2 * relative_error(causal_attention(*inputs), exact) + torch.finfo(dtype).eps
    assert relative_error(actual, exact) <= allowed


@pytest.mark.usefixtures("forbid_syncs")
@pytest.mark.parametrize("length", [1000, 4096])
def test_selection_never_waits_for_the_device(length: int) -> None:
    query, key, value = random_inputs(8, 2, length, 64, torch.bfloat16)
    arguments = (0.125, *SparsePrefillConfig(min_budget=256, max_budget=512).selection)
    tables = torch.ops.flexprefill.select_blocks(query, key, value, *arguments)  # raises if it waits
    assert all(table.is_cuda for table in tables)


def test_selection_is_that_of_the_cpu() -> None:
    query, key, value = random_inputs(8, 2, 4000, 64, torch.float32)
    query[:, :4] *= 3
    config = SparsePrefillConfig(min_budget=256)
    on_gpu = select_prefill_blocks(query, key, value, 0.125, config).cpu()
    on_cpu = select_prefill_blocks(query.cpu(), key.cpu(), value.cpu(), 0.125, config)
    # Sums in another order may move a block across the threshold: a handful of thousands.
    assert (on_gpu != on_cpu).sum() <= 1e-3 * on_cpu.sum()


def test_the_kernels_run_rather_than_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = random_inputs(8, 2, 1000, 64, torch.bfloat16)
    config = SparsePrefillConfig(min_budget=0)
    expected = select_prefill_tables(query, key, value, 0.125, config, 8)
    monkeypatch.setattr(prefill, "select_prefill_blocks", None)
    actual = select_prefill_tables(query, key, value, 0.125, config, 8)
    assert all(torch.equal(a, b) for a, b in zip(actual[::2], expected[::2], strict=True))


def test_a_replayed_graph_selects_for_new_inputs() -> None:
    inputs = random_inputs(8, 2, 1000, 64, torch.bfloat16)
    arguments = (0.125, [0.7], 0.1, 0, None, 64, 0, "flexprefill")
    select = torch.ops.flexprefill.select_blocks
    select(*inputs, *arguments)  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = select(*inputs, *arguments)
    for spread in (1, 4, 16):
        for x in inputs:
            x.normal_(std=spread)
        graph.replay()
        expected = select(*inputs, *arguments)
        assert torch.equal(replayed[2], expected[2])
        is_used = torch.arange(16, device="cuda") < expected[2].unsqueeze(-1)
        assert torch.equal(replayed[3].where(is_used, -1), expected[3].where(is_used, -1))


def test_memory_grows_linearly_under_a_ceiling() -> None:
    """Of the tables: twice the length takes twice the indices, not four times."""
    arguments = (0.125, [0.95], 0.1, 0, 1024, 128, 0, "flexprefill")
    elements = []
    for length in (8192, 16384):
        tables = torch.ops.flexprefill.select_blocks(*random_inputs(4, 2, length, 64, torch.bfloat16), *arguments)
        elements.append(sum(table.numel() for table in tables))
    assert elements[1] == 2 * elements[0]


@pytest.mark.parametrize("max_budget", [None, 512])
def test_every_width_of_the_tables_gives_the_same_attention(max_budget: int | None) -> None:
    inputs = random_inputs(4, 2, 1500, 64, torch.bfloat16)
    options: dict[str, Any] = {"gamma": 0.6, "min_length": 64, "min_budget": 0, "max_budget": max_budget}
    actual = torch.compile(causal_attention, backend=FlexPrefillBackend(), options=options)(*inputs)
    config = SparsePrefillConfig(gamma=0.6, min_budget=0, max_budget=max_budget)
    blocks = select_prefill_blocks(*inputs[:2], None, 0.125, config)
    mask = blocks.repeat_interleave(128, -1).repeat_interleave(128, -2)[..., :1500, :1500].tril()
    exact = attend_in_float64(*inputs, mask)
    assert relative_error(actual, exact) < 1e-2


def test_the_users_kernel_options_win() -> None:
    inputs = random_inputs(4, 2, 1000, 64, torch.bfloat16)
    options: dict[str, Any] = {"gamma": 1.0, "min_length": 64, "kernel_options": {"BLOCK_M": 64, "num_warps": 4}}
    compiled = torch.compile(causal_attention, backend=FlexPrefillBackend(), options=options)
    _, code = run_and_get_code(compiled, *inputs)
    assert "BLOCK_M : tl.constexpr = 64" in "".join(code)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_model_with_and_without_cuda_graphs(mode: str | None) -> None:
    model = TwoLayers(head_dims=(64, 64)).eval().cuda()
    backend = FlexPrefillBackend()

    def compile_graph(graph_module: Any, inputs: Any) -> Any:
        return backend(graph_module, inputs, mode=mode, options={"gamma": 1.0, "min_length": 64})

    compiled = torch.compile(model, backend=compile_graph, dynamic=False)
    with torch.no_grad():
        for _ in range(4):  # CUDA graphs warm up, record, then replay on new inputs
            x = torch.randn(2, 1000, 64, device="cuda")
            assert relative_error(compiled(x), model(x).double()) < 1e-5
    assert backend.report.num_rewritten == 2
