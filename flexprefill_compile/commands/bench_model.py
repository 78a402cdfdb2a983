"""``flexprefill bench-model``: time to the first token of a Llama-shaped model, dense and sparse."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from flexprefill_compile.block_masks import record_densities

from ..backend import FlexPrefillBackend
from ..bench.inputs.inputs import create_inputs
from ..bench.inputs.workloads import find_fastest_dense, name_backend, time_ms
from ..bench.model import Decoder, Layer, ModelShape, create_decoder, run_layer
from ..errors import UsageError
from ..report import format_table
from ..settings.config import SparsePrefillConfig
from .bench import check_device

CALLS = 3


def run_model_bench(
    shape: ModelShape, lengths: Sequence[int], density: float, device: str, json_path: Path | None
) -> None:
    """Prefill random tokens at each length, print both times, and write them as JSON if asked to.

    Random weights attend to everything alike, so that no selection would leave much out: ``max_budget`` brings the
    density to the one asked for. What is kept is then no measure of quality, and none is printed.

    Args:
        shape: Of the model.
        lengths: Of the prompts, in tokens.
        density: Share of the causal blocks to compute, in (0, 1].
        device: "cuda" or "cpu".
        json_path: A file for the figures, or None.

    Raises:
        UsageError: The device isn't there, or the density is out of range.
    """
    check_device(device)
    if not 0 < density <= 1:
        raise UsageError(f"density must be in (0, 1], got {density}")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = create_decoder(shape, device, dtype)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{shape}: {millions:.0f}M parameters, {dtype}, torch {torch.__version__}")
    runs = []
    for length in lengths:
        with torch.no_grad():
            try:
                runs.append({"tokens": length} | _measure_prefill(model, shape, length, density, device))
            except torch.OutOfMemoryError:
                runs.append({"tokens": length, "note": "out of memory"})
        if json_path:
            json_path.write_text(json.dumps(runs, indent=1) + "\n")
    print(format_table(("tokens", "blocks", "fastest dense", "sparse", "speed-up"), [_describe(run) for run in runs]))


def choose_budget(length: int, density: float, block_size: int) -> int:
    """Return the ``max_budget`` in tokens with which rows that want every block compute this share of the causal ones.

    A row of i blocks computes min(i, b) of them: of n rows b n - b^2 / 2, against n^2 / 2 in all.
    """
    blocks = round(-(-length // block_size) * (1 - math.sqrt(1 - density)))
    return max(1, blocks - 2) * block_size  # the first key block and the diagonal come on top


def _measure_prefill(model: Decoder, shape: ModelShape, length: int, density: float, device: str) -> dict[str, Any]:
    tokens = torch.randint(0, shape.vocabulary, (1, length), device=device)
    dtype = model.embedding.weight.dtype
    backend = find_fastest_dense(
        *create_inputs("random", (shape.heads, shape.kv_heads), length, shape.head_dim, device, dtype, None)
    )

    # The choice stands in the graph: inductor's caches don't look at what is set around it.
    def run_layer_densely(layer: Layer, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with sdpa_kernel(backend):
            return run_layer(layer, x, position)

    torch.compiler.reset()
    dense_ms = _time_first_token(model, tokens, torch.compile(run_layer_densely, dynamic=False))
    torch.compiler.reset()
    block_size = SparsePrefillConfig.block_size
    budget = choose_budget(length, density, block_size)
    options: dict[str, Any] = {"min_length": 1, "max_density": 1, "min_budget": min(1024, budget), "max_budget": budget}
    sparse = torch.compile(run_layer, backend=FlexPrefillBackend(), dynamic=False, options=options)
    with record_densities() as densities:
        model(tokens, sparse)
    return {
        "dense_backend": name_backend(backend),
        "dense_ms": dense_ms,
        "sparse_ms": _time_first_token(model, tokens, sparse),
        "density": torch.cat(densities).mean().item(),
        "max_budget": budget,
    }


def _time_first_token(model: Decoder, tokens: Tensor, compiled: Callable[..., Any]) -> float:
    return time_ms(lambda: model(tokens, compiled)[0], tokens.device.type, CALLS)


def _describe(run: dict[str, Any]) -> list[str]:
    if "note" in run:
        return [str(run["tokens"]), run["note"], "", "", ""]
    return [
        str(run["tokens"]),
        f"{run['density']:.0%}",
        f"{run['dense_ms']:.0f} ms ({run['dense_backend']})",
        f"{run['sparse_ms']:.0f} ms",
        f"{run['dense_ms'] / run['sparse_ms']:.2f}x",
    ]
