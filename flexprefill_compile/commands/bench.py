"""``flexprefill bench``: times the attention of one layer, by stage, beside dense attention, lower bounds and peers."""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bench.defaults import describe_defaults
from ..bench.inputs.kinds import INPUT_KINDS, create_inputs
from ..bench.inputs.saved import SAVED, load_inputs
from ..bench.measure_layer import measure_layer
from ..bench.peers import Peer, load_peer
from ..bench.plot import check_plot, plot_runs
from ..bench.tables import format_stages, format_totals
from ..bench.timing.rates import measure_rates
from ..errors import UsageError
from ..report import AttentionSkippedError
from ..settings.config import KERNEL_BACKENDS, SparsePrefillConfig
from ..settings.device_defaults import name_device, resolve_selection
from .shared.arguments import ESTIMATOR_HELP, add_layer_shape, positive
from .shared.checks import check_device_kind, check_file, check_heads, needs_extra

HELP = "time the attention of one layer, by stage, beside dense attention"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    config = SparsePrefillConfig
    add_layer_shape(parser)
    parser.add_argument(
        "--inputs", nargs="*", default=["structured", "random"], choices=INPUT_KINDS, help="kinds of inputs"
    )
    text = "the model of real inputs: a Hugging Face folder or a GGUF file (default: SmolLM2-135M-Instruct)"
    parser.add_argument("--model", type=Path, metavar="PATH", help=text)
    parser.add_argument("--saved", type=Path, metavar="FILE", help="also a (query, key, value) of torch.save")
    lengths = [8192, 32768, 131072]
    parser.add_argument("--lengths", type=positive, nargs="+", default=lengths, metavar="N", help="tokens of a prompt")
    parser.add_argument(
        "--gamma", type=float, metavar="N", help="share of attention to reach (default: the estimator's)"
    )
    text = "tokens that each query row computes at least (default: the estimator's)"
    parser.add_argument("--min-budget", type=int, metavar="N", help=text)
    text = "tokens to a side of a block (default: the device's)"
    parser.add_argument("--block-size", type=positive, metavar="N", help=text)
    text = "tokens that each query row computes at most (default: no limit)"
    parser.add_argument("--max-budget", type=positive, metavar="N", help=text)
    parser.add_argument("--estimator", default=config.estimator, metavar="NAME", help=ESTIMATOR_HELP)
    text = "also time the call under this ceiling on its share of blocks"
    parser.add_argument("--max-density", type=float, metavar="SHARE", help=text)
    text = "FlexAttention's kernel on a GPU"
    parser.add_argument("--kernel-backend", default=config.kernel_backend, choices=KERNEL_BACKENDS, help=text)
    parser.add_argument("--calls", type=positive, default=15, metavar="N", help="timed calls of each kind, at most")
    text = "module:function to time beside ours, f(q, k, v); may be repeated"
    parser.add_argument("--peer", action="append", default=[], metavar="NAME", help=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="a file for all figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a file for a picture; needs the extra 'plot'")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print a table of totals and one of stages, and write the files that were asked for.

    A row gets a note instead of figures if it does not fit into memory, its inputs can't be made or it stays dense.

    Raises:
        UsageError: The device is not there, the heads don't match, or a peer, a model, a file or a package is missing.
        InvalidOptionError: An option is out of range.
    """
    arguments.device = check_device_kind(arguments.device)
    check_heads(arguments.heads)
    config = _read_config(arguments)
    check_file(arguments.json)
    check_plot(arguments.plot)
    if "real" in arguments.inputs:
        _check_model(arguments.model)
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
    for line in describe_defaults(rows, torch.device(arguments.device)):
        print(line)
    if arguments.json:
        print(f"wrote {arguments.json}")
    if arguments.plot:
        plot_runs(rows, title, arguments.plot)
        print(f"wrote {arguments.plot}")


def _read_config(arguments: argparse.Namespace) -> SparsePrefillConfig:
    names = ("gamma", "min_budget", "max_budget", "max_density", "block_size", "estimator", "kernel_backend")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return resolve_selection(SparsePrefillConfig(**given), given, torch.device(arguments.device))


def _check_model(path: Path | None) -> None:
    """Check the model of real inputs.

    Raises:
        UsageError: The extra "hf" or the model is missing.
    """
    with needs_extra("hf", "--inputs real"):
        from ..models import find_model  # noqa: PLC0415  (needs the extra "hf")
    find_model(path)


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
