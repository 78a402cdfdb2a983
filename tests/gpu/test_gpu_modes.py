"""Compiled attention on a GPU: CUDA graphs, autotuning, no waiting, the ceiling's two ways, a million tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.models import attend_in_float64, causal_attention, relative_error
from torch import Tensor

from flexprefill_compile import SparsePrefillConfig
from flexprefill_compile.backend import FlexPrefillBackend
from flexprefill_compile.block_masks.layout import BlockTables
from flexprefill_compile.block_masks.prefill import select_prefill_blocks, select_prefill_tables
from flexprefill_compile.settings.device_defaults import is_flash_available

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SPARSE: dict[str, Any] = {"gamma": 0.6, "min_length": 64, "min_budget": 0}
CONFIG = SparsePrefillConfig(**SPARSE)
LENGTH = 1500


def random_inputs(length: int = LENGTH, head_dim: int = 64) -> list[Tensor]:
    return [torch.randn(1, n, length, head_dim, device="cuda", dtype=torch.bfloat16) for n in (4, 2, 2)]


def sink_inputs() -> list[Tensor]:
    """Return inputs whose every query looks at the first key."""
    query, key, value = random_inputs()
    key[:, :, 0] = 4
    return [query.abs(), key * 0.5, value]


def compile_attention(mode: str | None = None, **options: Any) -> Callable[..., Tensor]:
    backend = FlexPrefillBackend()

    def compile_graph(graph_module: Any, inputs: Any) -> Any:
        return backend(graph_module, inputs, mode=mode, options=SPARSE | options)

    return torch.compile(causal_attention, backend=compile_graph, dynamic=False)


def attend_over_selection(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return exact attention, float64, over the blocks that the reference selects."""
    blocks = select_prefill_blocks(query, key, None, query.shape[-1] ** -0.5, CONFIG)
    mask = blocks.repeat_interleave(128, -1).repeat_interleave(128, -2)[..., :LENGTH, :LENGTH].tril()
    return attend_in_float64(query, key, value, mask)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_replays_attend_over_what_new_inputs_need(mode: str) -> None:
    compiled = compile_attention(mode, max_density=0.1)  # graphs go without a ceiling
    for inputs in (random_inputs(), random_inputs(), sink_inputs(), random_inputs(), sink_inputs()):
        assert relative_error(compiled(*inputs), attend_over_selection(*inputs)) < 2e-2


def test_a_captured_call_takes_the_sparse_way() -> None:
    compiled, static = compile_attention(max_density=0.1), random_inputs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            compiled(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = compiled(*static)
    for inputs in (random_inputs(), sink_inputs()):
        for kept, new in zip(static, inputs, strict=True):
            kept.copy_(new)
        graph.replay()
        assert relative_error(output, attend_over_selection(*inputs)) < 2e-2


def test_below_the_ceilings_length_nothing_waits() -> None:
    compiled, inputs = compile_attention(), random_inputs(4096)
    compiled(*inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        compiled(*inputs)  # raises if it waits
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_ceiling_chooses_for_each_call() -> None:
    compiled = compile_attention(max_density=0.4)
    for _ in range(2):
        scattered, sparse = random_inputs(), sink_inputs()
        exact = causal_attention(*scattered)
        assert relative_error(compiled(*scattered), exact.double()) < 1e-2
        assert relative_error(attend_over_selection(*scattered), exact.double()) > 5e-2  # so it went the dense way
        assert relative_error(compiled(*sparse), attend_over_selection(*sparse)) < 2e-2


def test_a_million_tokens() -> None:
    length, budget, block_size = 2**20, 16384, 128
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of memory")
    query, key, value = (torch.randn(1, n, length, 128, device="cuda", dtype=torch.bfloat16) for n in (8, 2, 2))
    config = SparsePrefillConfig(max_budget=budget, min_length=64)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    tables: BlockTables = select_prefill_tables(query, key, value, 128**-0.5, config, budget // block_size + 1)
    assert torch.cuda.max_memory_allocated() - before < 2**30
    options = {"max_budget": budget, "min_length": 64, "max_density": 1}
    output = torch.compile(causal_attention, backend=FlexPrefillBackend(), dynamic=False, options=options)(
        query, key, value
    )
    for head, row in ((0, 5), (3, length // 2 + 77), (7, length - 1)):
        block = row // block_size
        count = int(tables.full_kv_num_blocks[0, head, block])
        columns = [*tables.full_kv_indices[0, head, block, :count].tolist(), block]
        tokens = torch.cat([torch.arange(c * block_size, (c + 1) * block_size) for c in columns])
        tokens = tokens[tokens <= row].cuda()
        scores = query[0, head, row].double() @ key[0, head // 4, tokens].double().mT * 128**-0.5
        exact = scores.softmax(-1) @ value[0, head // 4, tokens].double()
        assert relative_error(output[0, head, row], exact) < 2e-2


@pytest.mark.skipif(not is_flash_available(), reason="needs flash-attn-4")
def test_flash_attends_as_triton_does() -> None:
    inputs = random_inputs(head_dim=128)
    flash = compile_attention(kernel_backend="flash")(*inputs)
    assert relative_error(flash, attend_over_selection(*inputs)) < 2e-2
