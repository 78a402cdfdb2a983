"""``flexprefill explain``: which attention calls of a model run sparse, and why others stay dense."""

from __future__ import annotations

import argparse

from ..explain import report_calls
from ..settings.config import SparsePrefillConfig
from .shared.arguments import add_prompt, add_selection, read_selection
from .shared.checks import needs_extra
from .shared.prompt import check_prompt, load_prompt

HELP = "list the attention calls of a real model: rewritten, or why they stay dense"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_prompt(parser)
    add_selection(parser)


def run(arguments: argparse.Namespace) -> None:
    """Load a model, compile it for a prompt, and print what became of each attention call.

    Raises:
        UsageError: A file or a device is missing, or the model is no causal language model.
        InvalidOptionError: An option is out of range.
    """
    with needs_extra("hf", "explain"):
        from rich.console import Console  # noqa: PLC0415  (needs the extra "hf")

        from .shared.progress import show_steps  # noqa: PLC0415
    options = read_selection(arguments)
    SparsePrefillConfig(**options)
    check_prompt(arguments)
    console = Console()
    with show_steps(console) as step:
        step("loading the model")
        prompt = load_prompt(arguments)
        console.print(prompt.description, highlight=False)
        step("compiling")
        report = report_calls(prompt.model, (prompt.tokens,), {}, options)
    console.print(str(report), highlight=False, markup=False, soft_wrap=True)
