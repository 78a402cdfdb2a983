"""``flexprefill bench-real``: a real model on real text, by each way to attend: loss, density, time and memory."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from ..bench.plot import check_plot
from ..bench.real.compare import Row, compare_methods
from ..bench.real.figures import format_rows, plot_rows
from ..bench.real.methods import create_methods
from ..errors import UsageError
from ..settings.device_defaults import name_device
from .shared.arguments import positive
from .shared.checks import check_device_kind, check_file, needs_extra

HELP = "compare ways to attend inside a real model: KL, perplexity, density, time and memory beside dense attention"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--model", type=Path, metavar="PATH", help="a Hugging Face folder or a GGUF file (SmolLM2)")
    parser.add_argument("--texts", type=Path, nargs="*", default=[], metavar="FILE", help="texts (the demo's)")
    parser.add_argument("--lengths", type=positive, nargs="+", default=[8192, 32768], metavar="N", help="in tokens")
    parser.add_argument(
        "--sparse",
        action="append",
        default=[],
        metavar="OPTIONS",
        help="a sparse method: default, or options such as estimator=auto,gamma=0.8 (repeat for more)",
    )
    parser.add_argument("--peer", action="append", default=[], metavar="NAME", help="module:function, f(q, k, v)")
    parser.add_argument("--rounds", type=positive, default=4, metavar="N", help="timed prefills of each method")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a file for all figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a file for a picture (extra 'plot')")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print a table, and write the files that were asked for.

    Raises:
        UsageError: The device, the model, a text, a method or a file won't do.
    """
    arguments.device = check_device_kind(arguments.device)
    check_file(arguments.json)
    check_plot(arguments.plot)
    methods = create_methods(arguments.device, arguments.sparse or ["default"], arguments.peer)
    with needs_extra("hf", "bench-real"):
        from rich.console import Console  # noqa: PLC0415  (needs the extra "hf")

        from ..models import load_model, read_tokens  # noqa: PLC0415
        from .shared.progress import show_steps  # noqa: PLC0415
    model, tokenizer = load_model(arguments.model, arguments.device)
    rows: list[Row] = []
    with show_steps(Console(stderr=True)) as announce:
        for length in arguments.lengths:
            for path in arguments.texts or [None]:
                tokens, name = read_tokens(tokenizer, path, length)
                if tokens.shape[1] < length:
                    raise UsageError(f"{name} has {tokens.shape[1]} tokens, fewer than {length}: give longer --texts")
                tokens = tokens.to(arguments.device)
                rows += compare_methods(model, tokens, name, methods, arguments.rounds, announce)
                if arguments.json:  # after each prompt: what is measured stays if a later one breaks
                    _write_json(rows, arguments.json)
    dense = find_fastest_dense(rows)
    title = f"{name_device(torch.device(arguments.device))}, torch {torch.__version__}, {model.dtype}"
    print(f"{title}; faster: over {dense}")
    print(format_rows(rows, dense))
    if arguments.json:
        print(f"wrote {arguments.json}")
    if arguments.plot:
        plot_rows(rows, dense, title, arguments.plot)
        print(f"wrote {arguments.plot}")


def find_fastest_dense(rows: list[Row]) -> str:
    """Return the name of the dense method with the least attention time at the longest prompt.

    Raises:
        UsageError: No dense method runs the model's attention.
    """
    dense = [row for row in rows if row.method.startswith("dense") and row.figures]
    if not dense:
        raise UsageError(f"no dense backend runs this model's attention: {rows[0].note}")
    longest = max(row.tokens for row in dense)
    return min((row for row in dense if row.tokens == longest), key=lambda row: row.figures["attention_ms"]).method


def _write_json(rows: list[Row], path: Path) -> None:
    entries = [
        {"text": row.text, "tokens": row.tokens, "method": row.method, "note": row.note} | row.figures for row in rows
    ]
    path.write_text(json.dumps(entries, indent=1) + "\n")
