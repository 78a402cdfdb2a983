"""``flexprefill bench``: the attention of one layer, by stage, beside dense attention, the floors and any peer."""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bench.inputs.kinds import INPUT_KINDS, create_inputs
from ..bench.inputs.saved import SAVED, load_inputs
from ..bench.measure_layer import measure_layer
from ..bench.peers import Peer, load_peer
from ..bench.plot import plot_runs
from ..bench.tables import format_stages, format_totals
from ..bench.timing.rates import measure_rates
from ..errors import UsageError
from ..report import AttentionSkippedError
from ..settings.config import KERNEL_BACKENDS, SparsePrefillConfig
from ..settings.device_defaults import name_device, resolve_block_size
from .shared.arguments import add_layer_shape, positive
from .shared.checks import check_device, check_heads

HELP = "time the attention of one layer, by stage, beside dense attention"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    config = SparsePrefillConfig
    add_layer_shape(parser)
    parser.add_argument("--inputs", nargs="*", default=["structured", "random"], choices=INPUT_KINDS)
    parser.add_argument("--model", type=Path, help="where real inputs come from, as for demo (SmolLM2-135M-Instruct)")
    parser.add_argument("--saved", type=Path, metavar="FILE", help="also a (query, key, value) of torch.save")
    parser.add_argument("--lengths", type=positive, nargs="+", default=[8192, 32768, 131072], metavar="N")
    parser.add_argument("--gamma", type=float, help="share of attention to reach (the estimator's)")
    parser.add_argument("--min-budget", type=int, metavar="N", help="tokens a row computes at least (the estimator's)")
    parser.add_argument("--block-size", type=positive, metavar="N", help="tokens to a side of a block (the device's)")
    parser.add_argument("--max-budget", type=positive, metavar="N", help="tokens of a row to compute at most")
    parser.add_argument("--estimator", default=config.estimator, metavar="NAME", help="how blocks are chosen")
    parser.add_argument("--max-density", type=float, help="also time the call as it runs under this ceiling")
    parser.add_argument("--kernel-backend", default=config.kernel_backend, choices=KERNEL_BACKENDS)
    parser.add_argument("--calls", type=positive, default=15, metavar="N", help="timed calls of each kind, at most")
    parser.add_argument("--peer", action="append", default=[], help="module:function to time beside ours, f(q, k, v)")
    parser.add_argument("--json", type=Path, help="a file for all figures")
    parser.add_argument("--plot", type=Path, help="a file for a picture (extra 'plot')")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print a table of totals and one of stages, and write the files that were asked for.

    A row that doesn't fit into memory, that a model or file can't give or that stays dense gets a note, not figures.

    Raises:
        UsageError: The device isn't there, the heads don't match, or a peer or file won't do.
        InvalidOptionError: An option is out of range.
    """
    check_device(arguments.device)
    check_heads(arguments.heads)
    config = _read_config(arguments)
    peers = {path: load_peer(path) for path in arguments.peer}
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    rates = measure_rates(arguments.device, dtype)
    name = name_device(torch.device(arguments.device))
    shape = f"heads {list(arguments.heads)}, head dim {arguments.head_dim}"
    title = f"{name}, torch {torch.__version__}, {dtype}, {shape}"
    print(title)
    print(f"{config}\ncopies at {rates['copy'] / 1e9:.0f} GB/s, products at {rates['product'] / 1e9:.0f} GFLOP/s")
    rows: list[dict[str, Any]] = []
    for length in arguments.lengths:
        for kind in (*arguments.inputs, *([SAVED] if arguments.saved else [])):
            figures = _measure_row(arguments, kind, length, config, rates, peers)
            rows.append({"tokens": length, "inputs": kind} | figures)
            _free_memory()
            if arguments.json:  # after each row: what is measured stays if a later one breaks
                written = {"device": title, "rates": rates, "runs": rows}
                arguments.json.write_text(json.dumps(written, indent=1) + "\n")
    print(format_totals(rows))
    if stages := format_stages(rows):
        print(stages)
    if arguments.plot:
        plot_runs(rows, title, arguments.plot)


def _read_config(arguments: argparse.Namespace) -> SparsePrefillConfig:
    names = ("gamma", "min_budget", "max_budget", "max_density", "block_size", "estimator", "kernel_backend")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return resolve_block_size(SparsePrefillConfig(**given), given, torch.device(arguments.device))


def _measure_row(
    arguments: argparse.Namespace,
    kind: str,
    length: int,
    config: SparsePrefillConfig,
    rates: dict[str, float],
    peers: Mapping[str, Peer],
) -> dict[str, Any]:
    try:
        inputs = _create_inputs(arguments, kind, length)
        with torch.no_grad():
            return measure_layer(inputs, config, rates, arguments.calls, peers)
    except torch.OutOfMemoryError as error:
        return {"note": f"out of memory: {str(error).partition('.')[0]}"}
    except (UsageError, AttentionSkippedError) as error:
        return {"note": str(error)}


def _create_inputs(arguments: argparse.Namespace, kind: str, length: int) -> tuple[Tensor, Tensor, Tensor]:
    device, dtype = arguments.device, torch.bfloat16 if arguments.device == "cuda" else torch.float32
    if kind == SAVED:
        return load_inputs(arguments.saved, length, device, dtype)
    return create_inputs(kind, arguments.heads, length, arguments.head_dim, device, dtype, arguments.model)


def _free_memory() -> None:
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
