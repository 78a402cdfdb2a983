"""``flexprefill calibrate``: find the cheapest policy for some texts; print each measurement as it is made."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..devices import check_device
from ..errors import UsageError
from ..quality.calibration.calibrate import RUNGS, Calibration, calibrate, check_bound, check_text
from ..quality.calibration.ladder import Measurement
from ..settings.config import SparsePrefillConfig
from ..settings.policy import Policy
from ..text_table import format_table
from .shared.arguments import ESTIMATOR_HELP, add_device, add_model, positive
from .shared.checks import check_file, needs_extra

if TYPE_CHECKING:
    from rich.console import Console

HELP = "find the cheapest settings by layer that keep a model's loss within a bound"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    block_size = SparsePrefillConfig.block_size
    default = Path("policy.json")
    parser.add_argument("--output", type=Path, default=default, metavar="FILE", help="a JSON file for the policy")
    add_model(parser)
    parser.add_argument(
        "--text", type=Path, nargs="+", default=[], metavar="FILE", help="text files (default: licences)"
    )
    parser.add_argument("--tokens", type=positive, default=8192, metavar="N", help="tokens of each text, at most")
    parser.add_argument(
        "--bound", type=float, default=0.01, metavar="SHARE", help="allowed growth of perplexity: 0.01 is 1 %%"
    )
    parser.add_argument("--estimator", default="auto", metavar="NAME", help=ESTIMATOR_HELP)
    parser.add_argument("--block-size", type=positive, default=block_size, metavar="N", help="tokens a block")
    parser.add_argument(
        "--layers-at-once", type=positive, default=1, metavar="N", help="neighbouring layers that share settings"
    )
    text = f"measurements, at most; fewer than {len(RUNGS)} compare settings of the whole model only"
    parser.add_argument("--max-runs", type=positive, default=100, metavar="N", help=text)
    add_device(parser, "cpu")


def run(arguments: argparse.Namespace) -> None:
    """Load a model, calibrate it, write the policy and print it.

    The measurements go to a file beside the policy, of the same name with ``.runs.jsonl`` behind it.

    Raises:
        UsageError: A file or a device is missing, the model is no causal language model, or an input is out of range.
        InvalidOptionError: An option is out of range.
    """
    with needs_extra("hf", "calibrate"):
        from rich.console import Console  # noqa: PLC0415  (needs the extra "hf")

        from ..models import find_model, load_model, read_text, read_tokens  # noqa: PLC0415
        from .shared.progress import show_steps  # noqa: PLC0415
    config = SparsePrefillConfig(estimator=arguments.estimator, block_size=arguments.block_size)
    output: Path = arguments.output
    check_bound(arguments.bound)
    check_text(arguments.tokens, "the text", config.block_size)
    check_file(output)
    existing = Policy.load(output) if output.exists() else None
    check_device(arguments.device)
    find_model(arguments.model)
    for path in arguments.text:
        read_text(path)
    console = Console()
    with show_steps(console) as step:
        step("loading the model")
        model, tokenizer = load_model(arguments.model, arguments.device)
        _check_output(output, existing, model)
        texts = [read_tokens(tokenizer, path, arguments.tokens) for path in arguments.text or (None,)]
        for tokens, source in texts:
            console.print(f"{source}: {tokens.shape[1]} tokens", highlight=False)
            check_text(tokens.shape[1], source, config.block_size)
        step("measuring")
        found = calibrate(
            model,
            [tokens.to(arguments.device) for tokens, _ in texts],
            max_loss_increase=arguments.bound,
            config=config,
            layers_at_once=arguments.layers_at_once,
            max_runs=arguments.max_runs,
            runs_path=output.with_name(output.name + ".runs.jsonl"),
            on_run=_show_on(console),
        )
    found.policy.save(output)
    console.print(summarise(found, arguments.bound, config, output), highlight=False, markup=False, soft_wrap=True)


def _show_on(console: Console) -> Callable[[int, bool, Measurement, Measurement], None]:
    """Return what prints a measurement as soon as it is made."""

    def show(number: int, is_kept: bool, measured: Measurement, best: Measurement) -> None:
        line = f"run {number}{' (kept)' if is_kept else ''}: {_format(measured)}; best so far: {_format(best)}"
        console.print(line, highlight=False, soft_wrap=True)

    return show


def summarise(found: Calibration, bound: float, config: SparsePrefillConfig, output: Path) -> str:
    """Lay a calibration out: the settings of each layer, what they cost and lose, how to use them."""
    rows = [
        (
            str(layer),
            "dense" if settings.dense else f"{settings.gamma:g}",
            "" if settings.dense else str(settings.min_budget),
            f"{found.densities.get(layer, 1.0):.1%}",
        )
        for layer, settings in dict(found.policy.layers).items()
    ]
    options = f'{{"policy": "{output}", "block_size": {config.block_size}}}'
    return "\n".join(
        [
            format_table(("layer", "gamma", "min_budget", "density"), rows),
            f"perplexity x{found.perplexity_ratio:.4f} (bound x{1 + bound:g}) at density {found.density:.3f}, "
            f"{found.num_runs} runs",
            f'{output}: torch.compile(model, backend="flexprefill", options={options})',
        ]
    )


def _check_output(output: Path, existing: Policy | None, model: Any) -> None:
    """Refuse to write over a policy of another model."""
    if existing is None:
        return
    of, own = existing.model, model.config.get_text_config()
    if (of.architecture, of.num_heads) != (type(model).__name__, own.num_attention_heads):
        raise UsageError(
            f"{output} is a policy for another model, {of.architecture} with {of.num_heads} heads: "
            "choose another --output"
        )


def _format(measured: Measurement) -> str:
    return f"perplexity x{math.exp(measured.loss_increase):.4f} at density {measured.cost:.3f}"
