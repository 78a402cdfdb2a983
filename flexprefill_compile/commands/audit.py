"""``flexprefill audit``: what a model lost in the sparse prefill of a text."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..quality.audit.audit import ROWS, audit
from ..quality.sparsity import check_sparsity
from ..settings.config import SparsePrefillConfig
from .shared.arguments import add_prompt, add_selection, positive, read_selection
from .shared.checks import check_file, check_plots_folder, needs_extra, write_text
from .shared.prompt import check_prompt, load_prompt

HELP = "measure what sparse prefill of a model loses: by layer and head, and in its predictions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_prompt(parser)
    add_selection(parser)
    parser.add_argument("--rows", type=positive, default=ROWS, metavar="N", help="rows of each head to compute exactly")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a file for all figures")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="a folder for pictures; needs the extra 'plot'")


def run(arguments: argparse.Namespace) -> None:
    """Load, audit, print the report, and write the files that were asked for.

    Raises:
        UsageError: A file, a package or a device is missing, the model is no causal language model, or every block of
            the text would be computed.
        InvalidOptionError: An option is out of range.
    """
    with needs_extra("hf", "audit"):
        from rich.console import Console  # noqa: PLC0415  (needs the extra "hf")

        from .shared.progress import show_steps  # noqa: PLC0415
    options = read_selection(arguments)
    config = SparsePrefillConfig(**options)
    check_sparsity(arguments.tokens, config)
    check_file(arguments.json)
    check_plots_folder(arguments.plots)
    check_prompt(arguments)
    console = Console()
    with show_steps(console) as step:
        step("loading the model")
        prompt = load_prompt(arguments)
        console.print(prompt.description, highlight=False)
        report = audit(prompt.model, prompt.tokens, options=options, rows=arguments.rows, progress=step)
    console.print(str(report), highlight=False, markup=False, soft_wrap=True)
    if arguments.json is not None:
        write_text(arguments.json, report.to_json())
    if arguments.plots is not None:
        from ..quality.audit.plots import save_plots  # noqa: PLC0415  (needs the extra "plot")

        for file in save_plots(report, arguments.plots):
            console.print(f"wrote {file}", highlight=False, markup=False, soft_wrap=True)
