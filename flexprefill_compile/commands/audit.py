"""``flexprefill audit``: what sparse prefill of one text with one model kept and lost."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from ..errors import UsageError
from ..quality.audit.audit import ROWS, audit
from .shared.arguments import add_prompt, add_selection, positive, read_selection
from .shared.checks import needs_extra

HELP = "measure what sparse prefill of a model loses: by layer and head, and in its predictions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_prompt(parser)
    add_selection(parser)
    parser.add_argument("--rows", type=positive, default=ROWS, metavar="N", help="query rows a head to compute exactly")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a file for all figures")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="a folder for pictures")


def run(arguments: argparse.Namespace) -> None:
    """Load, audit, print the report, and write the files that were asked for.

    Raises:
        UsageError: A file, a package or a device is missing, or the model or the text won't do.
        InvalidOptionError: An option is out of range.
    """
    with needs_extra("hf", "audit"):
        from rich.console import Console  # noqa: PLC0415  (needs the extra "hf")

        from ..models import load_model, read_tokens  # noqa: PLC0415
        from .shared.progress import show_steps  # noqa: PLC0415
    _check_outputs(arguments.json, arguments.plots)
    console = Console()
    with show_steps(console) as step:
        step("loading the model")
        model, tokenizer = load_model(arguments.model, arguments.device)
        tokens, source = read_tokens(tokenizer, arguments.text, arguments.tokens)
        size = f"{tokens.shape[1]} tokens, {model.num_parameters() / 1e6:.0f}M parameters"
        console.print(f"{source}: {size}, {arguments.device}", highlight=False)
        options = read_selection(arguments)
        report = audit(model, tokens.to(arguments.device), options=options, rows=arguments.rows, progress=step)
    console.print(str(report), highlight=False, markup=False, soft_wrap=True)
    if arguments.json is not None:
        _write(arguments.json, report.to_json())
    if arguments.plots is not None:
        from ..quality.audit.plots import save_plots  # noqa: PLC0415  (needs the extra "plot")

        for file in save_plots(report, arguments.plots):
            console.print(f"wrote {file}", highlight=False, markup=False, soft_wrap=True)


def _check_outputs(json_path: Path | None, plots_path: Path | None) -> None:
    """Check before the long run what would fail after it.

    Raises:
        UsageError: The JSON file has no folder, or matplotlib is not installed and plots are asked for.
    """
    if plots_path is not None:
        importlib.import_module("flexprefill_compile.quality.audit.plots")
    if json_path is not None and not json_path.parent.is_dir():
        raise UsageError(f"can't write {json_path}: there is no folder {json_path.parent}")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"can't write {path}: {error.strerror}") from None
