"""``flexprefill calibrate``: find the cheapest policy for some texts; print each measurement as it is made."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..quality.calibration.calibrate import Calibration, calibrate, check_bound, check_text
from ..quality.calibration.ladder import Measurement
from ..settings.config import SparsePrefillConfig
from ..settings.policy import Policy
from ..text_table import format_table
from .shared.arguments import positive
from .shared.checks import needs_extra

if TYPE_CHECKING:
    from rich.console import Console

HELP = "find the cheapest settings by layer that keep a model's loss within a bound"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    block_size = SparsePrefillConfig.block_size
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="where the policy goes, as JSON")
    parser.add_argument("--model", type=Path, help="a Hugging Face model folder or a GGUF file (SmolLM2)")
    parser.add_argument(
        "--text", type=Path, nargs="+", default=[], metavar="FILE", help="text files (licence texts of this machine)"
    )
    parser.add_argument("--tokens", type=positive, default=8192, metavar="N", help="tokens of each text, at most")
    parser.add_argument("--bound", type=float, default=0.01, help="by how much of itself perplexity may grow")
    parser.add_argument("--estimator", default="auto", help="how blocks are chosen")
    parser.add_argument("--block-size", type=positive, default=block_size, metavar="N")
    parser.add_argument("--layers-at-once", type=positive, default=1, metavar="N", help="layers set alike")
    parser.add_argument("--max-runs", type=positive, default=100, metavar="N", help="measurements, at most")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")


def run(arguments: argparse.Namespace) -> None:
    """Load a model, calibrate it, write the policy and print it.

    The measurements go to a file beside the policy, of the same name with ``.runs.jsonl`` behind it.

    Raises:
        UsageError: A file or a device is missing, the model is no causal language model, or an input is out of range.
        InvalidOptionError: An option is out of range.
    """
    with needs_extra("hf", "calibrate"):
        from rich.console import Console  # noqa: PLC0415  (needs the extra "hf")

        from ..models import load_model, read_tokens  # noqa: PLC0415
        from .shared.progress import show_steps  # noqa: PLC0415
    config = SparsePrefillConfig(estimator=arguments.estimator, block_size=arguments.block_size)
    output: Path = arguments.output
    check_bound(arguments.bound)
    if not output.parent.is_dir():
        raise UsageError(f"no folder {output.parent} for the policy")
    console = Console()
    with show_steps(console) as step:
        step("loading the model")
        model, tokenizer = load_model(arguments.model, arguments.device)
        _check_output(output, model)
        texts = [read_tokens(tokenizer, path, arguments.tokens) for path in arguments.text or (None,)]
        for tokens, source in texts:
            console.print(f"{source}: {tokens.shape[1]} tokens", highlight=False)
            check_text(tokens, source, config.block_size)
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


def _check_output(output: Path, model: Any) -> None:
    """Refuse to write over what is not a policy of this model."""
    if not output.exists():
        return
    of, own = Policy.load(output).model, model.config.get_text_config()
    if (of.architecture, of.num_heads) != (type(model).__name__, own.num_attention_heads):
        raise UsageError(
            f"{output} is a policy for another model, {of.architecture} with {of.num_heads} heads: "
            "choose another --output"
        )


def _format(measured: Measurement) -> str:
    return f"perplexity x{math.exp(measured.loss_increase):.4f} at density {measured.cost:.3f}"
