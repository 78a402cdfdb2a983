"""``flexprefill calibrate``: texts in, a policy out, with what is measured on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import UsageError
from ..models import load_model, read_tokens
from ..quality.calibration.calibrate import Calibration, calibrate, check_bound, check_text
from ..quality.calibration.ladder import Measurement
from ..report import format_table
from ..settings.config import SparsePrefillConfig
from ..settings.policy import Policy
from .progress import show_steps


def run_calibrate(
    *,
    output: Path,
    model_path: Path | None,
    text_paths: Sequence[Path],
    max_tokens: int,
    bound: float,
    config: SparsePrefillConfig,
    layers_at_once: int,
    max_runs: int,
    device: str,
) -> None:
    """Load a model, calibrate it, write the policy and print it.

    Args:
        output: Where the policy goes; the measurements go to the same name with ``.runs.jsonl`` behind.
        model_path: A Hugging Face folder or a GGUF file; None is SmolLM2-135M-Instruct.
        text_paths: Text files; none is a text of this machine.
        max_tokens: Tokens of each text to take, at most.
        bound: By how much of itself perplexity may grow.
        config: What the layers have in common.
        layers_at_once: How many neighbouring layers share their settings.
        max_runs: Measurements at most.
        device: Where to run.

    Raises:
        UsageError: A file or a device is missing, the model is no causal language model, or an input is out of range.
    """
    console = Console()
    check_bound(bound)
    if not output.parent.is_dir():
        raise UsageError(f"no folder {output.parent} for the policy")
    with show_steps(console) as step:
        step("loading the model")
        model, tokenizer = load_model(model_path, device)
        _check_output(output, model)
        texts = [read_tokens(tokenizer, path, max_tokens) for path in text_paths or (None,)]
        for tokens, source in texts:
            console.print(f"{source}: {tokens.shape[1]} tokens", highlight=False)
            check_text(tokens, source, config.block_size)

        def show(number: int, is_kept: bool, run: Measurement, best: Measurement) -> None:
            line = f"run {number}{' (kept)' if is_kept else ''}: {_format(run)}; best so far: {_format(best)}"
            console.print(line, highlight=False, soft_wrap=True)

        step("measuring")
        found = calibrate(
            model,
            [tokens.to(device) for tokens, _ in texts],
            max_loss_increase=bound,
            config=config,
            layers_at_once=layers_at_once,
            max_runs=max_runs,
            runs_path=output.with_name(output.name + ".runs.jsonl"),
            on_run=show,
        )
    found.policy.save(output)
    console.print(summarise(found, bound, config, output), highlight=False, markup=False, soft_wrap=True)


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


def _format(run: Measurement) -> str:
    return f"perplexity x{math.exp(run.loss_increase):.4f} at density {run.cost:.3f}"
