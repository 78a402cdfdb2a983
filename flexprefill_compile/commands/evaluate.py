"""``flexprefill evaluate``: the tasks on a model, prefilled dense and prefilled sparse, side by side."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..settings.config import SparsePrefillConfig
from ..tasks.comparison import Comparison
from ..tasks.encoder import Encoder
from ..tasks.evaluation import Step, check_lengths, check_model, evaluate
from ..tasks.sample import Sample
from ..tasks.summary import summarise
from ..tasks.table import TASKS, check_tasks, create_samples
from .shared.arguments import add_selection, positive, read_selection
from .shared.checks import needs_extra

HELP = "long-context tasks on a real model, prefilled dense and sparse, side by side"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--model", type=Path, help="a Hugging Face folder or a GGUF file (SmolLM2-135M-Instruct)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="TASK", help=f"of {', '.join(TASKS)}")
    parser.add_argument(
        "--lengths", type=positive, nargs="+", default=[2048, 4096, 8192], metavar="N", help="tokens, with the answer"
    )
    parser.add_argument("--samples", type=positive, default=16, metavar="N", help="of each task at each length")
    parser.add_argument("--estimators", nargs="+", default=[SparsePrefillConfig.estimator], metavar="NAME")
    add_selection(parser, has_estimator=False)
    parser.add_argument("--min-length", type=positive, default=1, metavar="N", help="shorter prompts stay dense")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="other samples for other seeds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a file for all figures")


def run(arguments: argparse.Namespace) -> None:
    """Load a model, evaluate it, print the table, and write all figures as JSON if asked to.

    Raises:
        UsageError: An unknown task, a length that is too short or too long, or no causal language model.
        InvalidOptionError: An option is out of range.
    """
    with needs_extra("hf", "evaluate"):
        from rich.console import Console  # noqa: PLC0415  (needs the extra "hf")

        from ..models import load_model  # noqa: PLC0415
        from .shared.progress import show_progress  # noqa: PLC0415
    configs = _read_configs(arguments)
    check_tasks(arguments.tasks)
    check_lengths(arguments.lengths, configs.values())
    num_samples = len(arguments.tasks) * len(arguments.lengths) * arguments.samples
    # Each sample is made once, and scored once dense and once by each config.
    with show_progress(Console(), num_samples * (2 + len(configs))) as step:
        step("loading the model")
        model, tokenizer = load_model(arguments.model, arguments.device)
        check_model(model, arguments.lengths)
        comparisons = evaluate(model, _create_samples(arguments, Encoder(tokenizer), step), configs, step)
    print(summarise(comparisons))
    if arguments.json:
        _write_figures(arguments, configs, comparisons)


def _read_configs(arguments: argparse.Namespace) -> dict[str, SparsePrefillConfig]:
    """Return what to select, by the name of its estimator."""
    fields = read_selection(arguments) | {"min_length": arguments.min_length}
    return {name: SparsePrefillConfig(**(fields | {"estimator": name})) for name in arguments.estimators}


def _create_samples(
    arguments: argparse.Namespace, encoder: Encoder, step: Step
) -> dict[tuple[str, int], Sequence[Sample]]:
    def note() -> None:
        step("making the samples")

    return {
        (task, length): create_samples(task, encoder, length, arguments.samples, arguments.seed, note)
        for length in arguments.lengths
        for task in arguments.tasks
    }


def _write_figures(
    arguments: argparse.Namespace, configs: Mapping[str, SparsePrefillConfig], comparisons: Sequence[Comparison]
) -> None:
    settings = {
        "model": str(arguments.model),
        "device": arguments.device,
        "torch": torch.__version__,
        "seed": arguments.seed,
        "configs": {name: config.as_options() for name, config in configs.items()},
    }
    figures = {"settings": settings, "comparisons": [comparison.as_dict() for comparison in comparisons]}
    arguments.json.write_text(json.dumps(figures, indent=1, default=str) + "\n")
