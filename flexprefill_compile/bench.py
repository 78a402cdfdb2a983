"""``flexprefill bench``: the attention of one layer on a GPU, by stage, beside dense attention and the floors."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from flexprefill_compile.backend import FlexPrefillBackend
from flexprefill_compile.block_masks import record_densities
from flexprefill_compile.block_masks.prefill import select_prefill_tables
from flexprefill_compile.config import SparsePrefillConfig
from flexprefill_compile.errors import UsageError
from flexprefill_compile.report import format_table
from flexprefill_compile.workloads import attend, create_structured_inputs, time_dense_ms, time_ms

SELECTION_STAGES = (
    "pool_inputs",
    "score_representative",
    "pool_masses",
    "choose_patterns",
    "estimate_attention",
    "find_thresholds",
    "narrow_thresholds",
    "pack_blocks",
)
ATTENTION = "flex_attention"
SAMPLED_ROWS = 64
SAMPLED_HEADS = 8


def run_bench(
    lengths: Sequence[int], heads: Sequence[int], head_dim: int, gamma: float, calls: int, json_path: Path | None
) -> None:
    """Measure, print two tables, and write all figures as JSON if asked to.

    Raises:
        UsageError: There is no GPU.
    """
    if not torch.cuda.is_available():
        raise UsageError("bench needs a CUDA device; `flexprefill demo` compares on a CPU")
    config = SparsePrefillConfig(gamma=gamma, min_length=1)
    rates = measure_rates()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16, heads {list(heads)}, head dim {head_dim}"
    )
    print(
        f"{config}\ncopies at {rates['copy'] / 1e12:.2f} TB/s, bf16 products at {rates['product'] / 1e12:.0f} TFLOP/s"
    )
    figures = []
    for length in lengths:
        inputs = create_structured_inputs(heads[0], heads[1], length, head_dim, "cuda", torch.bfloat16)
        figures.append({"tokens": length, "inputs": "structured"} | measure(inputs, config, rates, calls))
        noise = tuple(torch.randn_like(x) for x in inputs)
        figures.append({"tokens": length, "inputs": "random"} | measure(noise, config, rates, calls))
        del inputs, noise
        torch.cuda.empty_cache()
    print(_format_totals(figures))
    print(_format_stages(figures))
    if json_path:
        json_path.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rates": rates, "runs": figures}))


def measure_rates() -> dict[str, float]:
    """Measure bytes a second of a large copy, read and written, and FLOP a second of a large bf16 product."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    copy_ms = time_ms(lambda: target.copy_(source), "cuda", 10)
    copied = 2 * source.nbytes
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product_ms = time_ms(lambda: a @ b, "cuda", 10)
    return {"copy": copied / copy_ms * 1e3, "product": 2 * 8192**3 / product_ms * 1e3}


def measure(
    inputs: tuple[Tensor, ...], config: SparsePrefillConfig, rates: dict[str, float], calls: int
) -> dict[str, Any]:
    """Measure one layer on given inputs; times in milliseconds."""
    query, key, value = inputs
    scale = query.shape[-1] ** -0.5

    def select() -> tuple[Tensor, ...]:
        tables: tuple[Tensor, ...] = torch.ops.flexprefill.select_blocks(query, key, value, scale, *config.selection)
        return tables

    torch.compiler.reset()
    options: dict[str, Any] = {"gamma": config.gamma, "min_length": 1}
    sparse = torch.compile(attend, backend=FlexPrefillBackend(), dynamic=False, options=options)
    with torch.no_grad():
        dense = time_dense_ms(query, key, value, calls)
        with record_densities() as densities:
            output = sparse(query, key, value)
        exact = attend(query, key, value)
        figures: dict[str, Any] = {
            "density": densities[0].mean().item(),
            "recall": measure_recall(query, key, scale, config),
            "error": ((output - exact).float().norm() / exact.float().norm()).item(),
            "dense_ms": dense,
            "selection_ms": time_ms(select, "cuda", calls),
            "selection_replayed_ms": time_ms(_capture(select), "cuda", calls),
            "sparse_ms": time_ms(lambda: sparse(query, key, value), "cuda", calls),
            "sparse_replayed_ms": time_ms(_capture(lambda: sparse(query, key, value)), "cuda", calls),
            "selection_peak_mib": _measure_peak(select),
            "stages_ms": _time_stages(lambda: sparse(query, key, value)),
        }
    figures["floors_ms"] = _compute_floors(query, key, value, config.block_size, figures["density"], rates)
    return figures


def measure_recall(query: Tensor, key: Tensor, scale: float, config: SparsePrefillConfig) -> dict[str, float]:
    """Measure the attention mass that the selection keeps, exactly, on sampled rows of sampled heads."""
    heads, length = query.shape[1:3]
    num_blocks = -(-length // config.block_size)
    tables = select_prefill_tables(query, key, None, scale, config, num_blocks)
    sampled_heads = torch.linspace(0, heads - 1, min(heads, SAMPLED_HEADS), device=query.device).long()
    rows = torch.randint(0, length, (SAMPLED_ROWS,), device=query.device, generator=_generator())
    scores = query[0, sampled_heads[:, None], rows].float() @ key[0, sampled_heads * key.shape[1] // heads].float().mT
    is_future = torch.arange(length, device=query.device) > rows[:, None]
    weights = (scores * scale).masked_fill(is_future, -torch.inf).softmax(-1)
    by_block = (
        torch.nn.functional.pad(weights, (0, -length % config.block_size)).unflatten(-1, (num_blocks, -1)).sum(-1)
    )
    picked = (0, sampled_heads[:, None], rows // config.block_size)
    columns = tables.full_kv_indices[picked]
    is_used = torch.arange(num_blocks, device=query.device) < tables.full_kv_num_blocks[picked].unsqueeze(-1)
    kept = by_block.gather(-1, columns.where(is_used, 0).long()).where(is_used, 0).sum(-1)
    kept += by_block.gather(-1, (rows // config.block_size).expand(len(sampled_heads), -1).unsqueeze(-1)).squeeze(-1)
    return {"mean": kept.mean().item(), "p10": kept.flatten().quantile(0.1).item(), "worst": kept.min().item()}


def _generator() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(0)


def _capture(run: Callable[[], object]) -> Callable[[], None]:
    """Return a replay of what a call launches, as a CUDA graph: no time of the host in it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _measure_peak(run: Callable[[], object]) -> float:
    """Return how much memory a call takes at its peak beside its inputs, in MiB."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _time_stages(run: Callable[[], object]) -> dict[str, float]:
    """Return the time of each of our kernels and of FlexAttention's in a call, by the profiler."""
    calls = 5
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    times = dict.fromkeys((*SELECTION_STAGES, ATTENTION), 0.0)
    for event in profiler.key_averages():
        for stage in times:
            if stage in event.key:
                times[stage] += event.device_time_total / calls / 1e3
    return times


def _compute_floors(
    query: Tensor, key: Tensor, value: Tensor, block_size: int, density: float, rates: dict[str, float]
) -> dict[str, float]:
    """Return what no version of the main stages runs faster than: bytes and operations over the measured rates."""
    heads, length, head_dim = query.shape[1:]
    num_blocks = -(-length // block_size)
    blocks = density * heads * num_blocks * (num_blocks + 1) / 2
    return {
        "pool_inputs": (query.nbytes + key.nbytes + value.nbytes) / rates["copy"] * 1e3,
        "score_representative": 2 * heads * min(block_size, length) * length * head_dim / rates["product"] * 1e3,
        ATTENTION: 2 * (head_dim + value.shape[-1]) * block_size**2 * blocks / rates["product"] * 1e3,
    }


def _format_totals(figures: Sequence[dict[str, Any]]) -> str:
    dense = sorted({name for run in figures for name in run["dense_ms"]})
    header = ("tokens", "inputs", "blocks", "recall (p10)", "error", *(f"dense {name}" for name in dense))
    header += ("selection", "replayed", "sparse, all", "replayed", "speed-up", "selection peak")
    rows = []
    for run in figures:
        fastest = min(run["dense_ms"].values())
        rows.append(
            [
                str(run["tokens"]),
                run["inputs"],
                f"{run['density']:.0%}",
                f"{run['recall']['mean']:.3f} ({run['recall']['p10']:.3f})",
                f"{run['error']:.3f}",
                *(f"{run['dense_ms'].get(name, float('nan')):.2f} ms" for name in dense),
                *(f"{run[name]:.3f} ms" for name in ("selection_ms", "selection_replayed_ms")),
                *(f"{run[name]:.2f} ms" for name in ("sparse_ms", "sparse_replayed_ms")),
                f"{fastest / run['sparse_ms']:.2f}x ({fastest / run['sparse_replayed_ms']:.2f}x)",
                f"{run['selection_peak_mib']:.0f} MiB",
            ]
        )
    return format_table(header, rows)


def _format_stages(figures: Sequence[dict[str, Any]]) -> str:
    header = ("stage", *(f"{run['tokens']} {run['inputs']}" for run in figures))
    rows = []
    for stage in (*SELECTION_STAGES, ATTENTION):
        cells = []
        for run in figures:
            floor = run["floors_ms"].get(stage)
            time = run["stages_ms"][stage]
            cells.append(f"{time:.3f} ms" + (f" ({time / floor:.1f}x)" if floor else ""))
        rows.append([stage, *cells])
    return format_table(header, rows)
