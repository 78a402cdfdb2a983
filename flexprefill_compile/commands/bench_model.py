"""``flexprefill bench-model``: time to the first token of a Llama-shaped model, dense and sparse."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from flexprefill_compile.block_masks import record_densities

from ..backend import FlexPrefillBackend
from ..bench.decoder import Decoder, DecoderShape, Layer, create_decoder, run_layer
from ..bench.inputs.kinds import create_inputs
from ..bench.timing.clocks import time_ms
from ..bench.timing.dense_attention import find_fastest_dense, name_backend
from ..errors import UsageError
from ..settings.config import SparsePrefillConfig
from ..text_table import format_table
from .shared.arguments import add_layer_shape, positive
from .shared.checks import check_device

HELP = "time a Llama-shaped model with random weights to its first token, dense and sparse"

_CALLS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_layer_shape(parser, head_dim=False)
    shape = DecoderShape()
    for name in ("layers", "hidden", "intermediate", "vocabulary"):
        parser.add_argument(f"--{name}", type=positive, default=getattr(shape, name), metavar="N")
    parser.add_argument("--lengths", type=positive, nargs="+", default=[8192, 32768, 131072], metavar="N")
    parser.add_argument("--density", type=float, default=0.25, help="share of the causal blocks to compute")
    parser.add_argument("--json", type=Path, help="a file for the figures")


def run(arguments: argparse.Namespace) -> None:
    """Prefill random tokens at each length, print both times, and write them as JSON if asked to.

    Random weights attend to everything alike, so that no selection would leave much out: ``max_budget`` brings the
    density to the one asked for. What is kept is then no measure of quality, and none is printed.

    Raises:
        UsageError: The device isn't there, or the density is out of range.
    """
    check_device(arguments.device)
    if not 0 < arguments.density <= 1:
        raise UsageError(f"density must be in (0, 1], got {arguments.density}")
    shape = _read_shape(arguments)
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    model = create_decoder(shape, arguments.device, dtype)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{shape}: {millions:.0f}M parameters, {dtype}, torch {torch.__version__}")
    rows: list[dict[str, Any]] = []
    for length in arguments.lengths:
        with torch.no_grad():
            try:
                figures = _measure_prefill(model, shape, length, arguments.density, arguments.device)
            except torch.OutOfMemoryError:
                figures = {"note": "out of memory"}
        rows.append({"tokens": length} | figures)
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(format_table(("tokens", "blocks", "fastest dense", "sparse", "speed-up"), [_describe(row) for row in rows]))


def _read_shape(arguments: argparse.Namespace) -> DecoderShape:
    heads, kv_heads = arguments.heads
    return DecoderShape(
        layers=arguments.layers,
        hidden=arguments.hidden,
        intermediate=arguments.intermediate,
        heads=heads,
        kv_heads=kv_heads,
        vocabulary=arguments.vocabulary,
    )


def choose_budget(length: int, density: float, block_size: int) -> int:
    """Return the ``max_budget`` in tokens with which rows that want every block compute this share of the causal ones.

    A row of i blocks computes min(i, b) of them: of n rows b n - b^2 / 2, against n^2 / 2 in all.
    """
    blocks = round(-(-length // block_size) * (1 - math.sqrt(1 - density)))
    return max(1, blocks - 2) * block_size  # the first key block and the diagonal come on top


def _measure_prefill(model: Decoder, shape: DecoderShape, length: int, density: float, device: str) -> dict[str, Any]:
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
    return time_ms(lambda: model(tokens, compiled)[0], tokens.device.type, _CALLS)


def _describe(row: dict[str, Any]) -> list[str]:
    if "note" in row:
        return [str(row["tokens"]), row["note"], "", "", ""]
    return [
        str(row["tokens"]),
        f"{row['density']:.0%}",
        f"{row['dense_ms']:.0f} ms ({row['dense_backend']})",
        f"{row['sparse_ms']:.0f} ms",
        f"{row['dense_ms'] / row['sparse_ms']:.2f}x",
    ]
