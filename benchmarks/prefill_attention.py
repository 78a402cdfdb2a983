"""Time the attention of one layer: every dense backend, our selection, and selection plus attention.

All sides run on the same inputs in one process; each figure is the median of timed calls after a warm-up.

Run: python benchmarks/prefill_attention.py --device cuda --lengths 8192 32768 131072
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flexprefill_compile import SparsePrefillConfig
from flexprefill_compile.backend import FlexPrefillBackend
from flexprefill_compile.block_masks import record_densities
from flexprefill_compile.report import format_table

DENSE_BACKENDS = {
    "cpu": (SDPBackend.FLASH_ATTENTION,),
    "cuda": (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION),
}


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend causally with shared key heads."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def create_structured_inputs(
    heads: int, kv_heads: int, length: int, head_dim: int, device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Make queries and keys with a sink, a few heavy columns, and topics that last some hundred tokens.

    Returns:
        query (1, heads, length, head_dim), key and value (1, kv_heads, length, head_dim).
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    common = normal(head_dim)
    common /= common.norm()
    topics = normal(length // 512 + 1, head_dim).repeat_interleave(512, 0)[:length]
    query = normal(1, heads, length, head_dim) + 4 * common * head_dim**0.25 + topics
    key = normal(1, kv_heads, length, head_dim) + topics
    heavy = torch.randint(0, length, (16,), generator=generator, device=device)
    heavy[:2] = torch.arange(2, device=device)
    key[:, :, heavy] += 8 * common * head_dim**0.25
    return query.to(dtype), key.to(dtype), normal(1, kv_heads, length, head_dim).to(dtype)


def time_ms(run: Callable[[], object], device: str, calls: int) -> float:
    """Return the median of ``calls`` timed calls, in milliseconds, after two that warm up."""
    times = []
    for call in range(calls + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if call >= 2:
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def main() -> None:
    """Print a row for each length and kind of input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=DENSE_BACKENDS)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192])
    parser.add_argument("--heads", type=int, nargs=2, default=[32, 8], metavar=("QUERY", "KEY"))
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--gamma", type=float, default=SparsePrefillConfig.gamma)
    parser.add_argument("--calls", type=int, default=7, help="timed calls of each kind")
    arguments = parser.parse_args()
    device = arguments.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = SparsePrefillConfig(gamma=arguments.gamma, min_length=1)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {dtype}, heads {arguments.heads}, head dim {arguments.head_dim}")
    print(config)

    rows = []
    for length in arguments.lengths:
        inputs = create_structured_inputs(*arguments.heads, length, arguments.head_dim, device, dtype)
        randoms = tuple(torch.randn_like(x) for x in inputs)
        for kind, (query, key, value) in (("structured", inputs), ("random", randoms)):
            rows.append([str(length), kind, *_measure(query, key, value, config, device, arguments.calls)])
    dense = [f"dense {backend.name.removesuffix('_ATTENTION').lower()}" for backend in DENSE_BACKENDS[device]]
    print(
        format_table(
            ("tokens", "inputs", "blocks", *dense, "selection", "sparse, all", "speed-up", "selection peak"), rows
        )
    )


def _measure(
    query: Tensor, key: Tensor, value: Tensor, config: SparsePrefillConfig, device: str, calls: int
) -> list[str]:
    torch.compiler.reset()
    backend = FlexPrefillBackend()
    options = {"gamma": config.gamma, "min_length": 1}
    sparse = torch.compile(attend, backend=backend, dynamic=False, options=options)
    scale = query.shape[-1] ** -0.5
    settings = (config.gamma, config.tau, config.min_budget, config.max_budget, config.block_size, config.estimator)

    def select() -> object:
        return torch.ops.flexprefill.select_blocks(query, key, value, scale, *settings)

    with torch.no_grad():
        dense_ms = []
        for dense_backend in DENSE_BACKENDS[device]:
            with sdpa_kernel(dense_backend):
                dense_ms.append(time_ms(lambda: attend(query, key, value), device, calls))
        selection_ms = time_ms(select, device, calls)
        peak = _measure_peak(select, device)
        with record_densities() as densities:
            sparse(query, key, value)
        sparse_ms = time_ms(lambda: sparse(query, key, value), device, calls)
    return [
        f"{densities[0].mean().item():.0%}",
        *(f"{ms:.2f} ms" for ms in (*dense_ms, selection_ms, sparse_ms)),
        f"{min(dense_ms) / sparse_ms:.2f}x",
        peak,
    ]


def _measure_peak(run: Callable[[], object], device: str) -> str:
    """Return how much memory a call takes at its peak beside its inputs; torch counts it on a GPU only."""
    if device == "cpu":
        return "-"
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f} MiB"


if __name__ == "__main__":
    main()
