"""``flexprefill audit``: what sparse prefill of one text with one model kept and lost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import UsageError
from ..models import load_model, read_tokens
from ..quality.audit.audit import audit
from .progress import show_steps


def run_audit(
    *,
    model_path: Path | None,
    text_path: Path | None,
    max_tokens: int,
    options: Mapping[str, Any],
    rows: int,
    json_path: Path | None,
    plots_path: Path | None,
    device: str,
) -> None:
    """Load, audit, print the report, and write what was asked for.

    Args:
        model_path: A Hugging Face folder or a GGUF file; None is SmolLM2-135M-Instruct.
        text_path: A text file; None is a text of this machine.
        max_tokens: Tokens of the text to take, at most.
        options: As for ``torch.compile``.
        rows: Query rows of each head to compute exactly.
        json_path: A file for all figures.
        plots_path: A folder for pictures.
        device: Where to run.

    Raises:
        UsageError: A file, a package or a device is missing, or the model or the text won't do.
        InvalidOptionError: An option is out of range.
    """
    if plots_path is not None:
        _check_matplotlib()
    if json_path is not None and not json_path.parent.is_dir():
        raise UsageError(f"can't write {json_path}: there is no folder {json_path.parent}")
    console = Console()
    with show_steps(console) as step:
        step("loading the model")
        model, tokenizer = load_model(model_path, device)
        tokens, source = read_tokens(tokenizer, text_path, max_tokens)
        console.print(
            f"{source}: {tokens.shape[1]} tokens, {model.num_parameters() / 1e6:.0f}M parameters, {device}",
            highlight=False,
        )
        report = audit(model, tokens.to(device), options=options, rows=rows, progress=step)
    console.print(str(report), highlight=False, markup=False, soft_wrap=True)
    if json_path is not None:
        _write(json_path, report.to_json())
    if plots_path is not None:
        for file in report.save_plots(plots_path):
            console.print(f"wrote {file}", highlight=False, markup=False, soft_wrap=True)


def _check_matplotlib() -> None:
    """Find out before the long run.

    Raises:
        UsageError: It is not installed.
    """


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"can't write {path}: {error.strerror}") from None
