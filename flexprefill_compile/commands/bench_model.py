"""``flexprefill bench-model``: time to the first token of a Llama-shaped model, dense and sparse."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from flexprefill_compile.block_masks import record_densities

from ..backend import FlexPrefillBackend
from ..bench.decoder import Decoder, DecoderShape, Layer, create_decoder, run_layer
from ..bench.defaults import describe_defaults
from ..bench.inputs.kinds import create_inputs
from ..bench.ranks import KINDS, WAYS, RankBench, measure_on_ranks, start_ranks
from ..bench.timing.clocks import time_ms
from ..bench.timing.dense_attention import find_fastest_dense, name_backend
from ..errors import UsageError
from ..settings.config import SparsePrefillConfig
from ..text_table import format_table
from .shared.arguments import add_layer_shape, positive
from .shared.checks import check_device_kind, check_file, check_heads

HELP = "time a Llama-shaped model with random weights to its first token, dense and sparse"

_CALLS = 3
_COLUMNS = ("parallel", "tokens", "kind", "first token", "peak a card", "collectives", "blocks", "uneven")
_LINE = "{:10}{:>9}  {:8}{:>14}{:>13}{:>13}{:>8}{:>8}"
_SIZES = {
    "layers": "number of layers",
    "hidden": "width of the model",
    "intermediate": "width inside the feed-forward net",
    "vocabulary": "number of tokens it knows",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_layer_shape(parser, head_dim=False)
    shape = DecoderShape()
    for name, text in _SIZES.items():
        parser.add_argument(f"--{name}", type=positive, default=getattr(shape, name), metavar="N", help=text)
    lengths = [8192, 32768, 131072]
    parser.add_argument("--lengths", type=positive, nargs="+", default=lengths, metavar="N", help="tokens of a prompt")
    parser.add_argument("--density", type=float, default=0.25, metavar="SHARE", help="share of the blocks to compute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a file for the figures")
    ranks = parser.add_argument_group("under torchrun")
    ranks.add_argument("--parallel", nargs="+", default=list(WAYS), choices=WAYS, help="how ranks share a prefill")
    ranks.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="of attention")


def run(arguments: argparse.Namespace) -> None:
    """Prefill random tokens at each length, print both times, and write them as JSON if asked to.

    Random weights attend to everything alike, so that no selection would leave much out: ``max_budget`` brings the
    density to the one asked for. What is kept is then no measure of quality, and none is printed.

    Raises:
        UsageError: The device isn't there, or the density is out of range.
    """
    arguments.device = check_device_kind(arguments.device)
    check_heads(arguments.heads)
    check_file(arguments.json)
    if not 0 < arguments.density <= 1:
        raise UsageError(f"density must be in (0, 1], got {arguments.density}")
    shape = _read_shape(arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _run_on_ranks(arguments, shape)
        return
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
    for line in describe_defaults(rows, torch.device(arguments.device)):
        print(line)
    if arguments.json:
        print(f"wrote {arguments.json}")


def _run_on_ranks(arguments: argparse.Namespace, shape: DecoderShape) -> None:
    """Run under torchrun: every rank measures, rank 0 prints each line as it comes.

    Raises:
        UsageError: The ranks can't share the heads, the hidden units or the tokens evenly.
    """
    group = start_ranks(arguments.device)
    for name, size in (("heads", shape.heads), ("intermediate", shape.intermediate)):
        if size % group.size:
            raise UsageError(f"{name} must be a multiple of the {group.size} ranks, got {size}")
    if uneven := [length for length in arguments.lengths if length % group.size]:
        raise UsageError(f"lengths must be multiples of the {group.size} ranks, got {uneven[0]}")
    bench = RankBench(
        shape=shape,
        lengths=arguments.lengths,
        ways=arguments.parallel,
        kinds=arguments.kinds,
        options=lambda length: _choose_options(length, arguments.density),
        device=arguments.device,
    )
    rows: list[dict[str, Any]] = []
    if group.rank == 0:
        print(f"{shape}, torch {torch.__version__}, {group.size} ranks", flush=True)
        print(_LINE.format(*_COLUMNS), flush=True)
    with torch.no_grad():
        for row in measure_on_ranks(bench, group):
            rows.append(row)
            if group.rank == 0:
                print(_LINE.format(*_describe_on_ranks(row)).rstrip(), flush=True)
                if arguments.json:
                    arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    dist.destroy_process_group()


def _describe_on_ranks(row: dict[str, Any]) -> list[str]:
    start = [row["way"], str(row["tokens"]), row["kind"]]
    if "note" in row:
        return [*start, row["note"], "", "", "", ""]
    blocks = [f"{row['density']:.0%}", f"{row['uneven']:.1%}"] if "density" in row else ["", ""]
    return [*start, f"{row['ms']:.0f} ms", f"{row['memory_gib']:.1f} GiB", f"{row['collectives']:.1%}", *blocks]


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
    """Return the ``max_budget`` in tokens that gives a density, if each row computes as many blocks as it may.

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
    options = _choose_options(length, density)
    sparse = torch.compile(run_layer, backend=FlexPrefillBackend(), dynamic=False, options=options)
    with record_densities() as densities:
        model(tokens, sparse)
    return {
        "dense_backend": name_backend(backend),
        "dense_ms": dense_ms,
        "sparse_ms": _time_first_token(model, tokens, sparse),
        "density": torch.cat(densities).mean().item(),
        "max_budget": options["max_budget"],
    }


def _choose_options(length: int, density: float) -> dict[str, Any]:
    budget = choose_budget(length, density, SparsePrefillConfig.block_size)
    return {"min_length": 1, "max_density": 1, "min_budget": min(1024, budget), "max_budget": budget}


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
