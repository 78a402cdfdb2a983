"""``flexprefill demo``: one prefill of a real model, dense and sparse, side by side."""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flexprefill_compile.block_masks import record_densities

from ..backend import FlexPrefillBackend
from ..quality.predictions import sum_loss
from ..quality.sparsity import check_sparsity
from ..report import RewriteReport, Skipped
from ..settings.config import SparsePrefillConfig
from ..text_table import format_table
from .shared.arguments import add_prompt, add_selection, positive, read_selection
from .shared.checks import needs_extra
from .shared.prompt import check_prompt, load_prompt

HELP = "prefill a real model dense and sparse, and compare"

_CONTINUATION_TOKENS = 12


@dataclasses.dataclass
class Prefill:
    """What one kind of prefill took and gave.

    Attributes:
        run: The compiled model.
        first_s: Seconds of the first call, compilation included.
        times_s: Seconds of each later call.
        loss: Mean negative log-likelihood of the text's tokens, nats.
        predictions: (S,), the most likely next token at each position.
        continuation: The first words that follow the text, by greedy decoding.
        densities: The share of blocks computed, (B, H) for each selection; empty for dense attention.
    """

    run: Callable[..., Any]
    first_s: float = 0.0
    times_s: list[float] = dataclasses.field(default_factory=list)
    loss: float = math.nan
    predictions: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    continuation: str = ""
    densities: list[Tensor] = dataclasses.field(default_factory=list)

    @property
    def median_s(self) -> float:
        """Seconds of a call once compiled."""
        return statistics.median(self.times_s)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_prompt(parser)
    add_selection(parser)
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="timed prefills of each kind, in turn")


def run(arguments: argparse.Namespace) -> None:
    """Load, prefill dense and sparse in turn, and print the comparison.

    Raises:
        UsageError: A file or a device is missing, the model is no causal language model, or every block of the text
            would be computed.
        InvalidOptionError: An option is out of range.
    """
    with needs_extra("hf", "the demo"):
        from rich.console import Console  # noqa: PLC0415  (needs the extra "hf")

        from .shared.progress import show_steps  # noqa: PLC0415
    config = SparsePrefillConfig(**read_selection(arguments), min_length=min(arguments.tokens, 4096))
    check_sparsity(arguments.tokens, config)
    check_prompt(arguments)
    console = Console()
    with show_steps(console) as step:
        step("loading the model")
        model, tokenizer, tokens, description = load_prompt(arguments)
        console.print(description)
        check_sparsity(tokens.shape[1], config)

        backend = FlexPrefillBackend()
        dense = Prefill(torch.compile(model, backend="inductor"))
        sparse = Prefill(torch.compile(model, backend=backend, options=config.as_options()))
        with torch.no_grad():
            for name, prefill in (("dense", dense), ("sparse", sparse)):
                step(f"{name}: compiling")
                with record_densities() as prefill.densities:
                    prefill.first_s, output = _time(prefill.run, tokens)
                step(f"{name}: perplexity and continuation")
                prefill.loss = sum_loss(output.logits[0], tokens[0]) / (tokens.shape[1] - 1)
                prefill.predictions = output.logits[0, :-1].argmax(-1)
                prefill.continuation = _continue(model, tokenizer, output)
                del output
            for done in range(arguments.rounds):
                for name, prefill in (("dense", dense), ("sparse", sparse)):
                    step(f"{name}: prefill {done + 1} of {arguments.rounds}")
                    prefill.times_s.append(_time(prefill.run, tokens)[0])
    console.print(summarise(dense, sparse, backend.report), highlight=False, markup=False, soft_wrap=True)


def summarise(dense: Prefill, sparse: Prefill, report: RewriteReport) -> str:
    """Lay the two prefills out side by side."""
    layers = [density.mean().item() for density in sparse.densities] or [1.0]
    agreement = (dense.predictions == sparse.predictions).double().mean().item()
    rows = [
        (
            "prefill",
            *(_format_time(run.median_s) for run in (dense, sparse)),
            _compare_times(dense.median_s, sparse.median_s),
        ),
        ("compile", *(f"{max(0.0, run.first_s - run.median_s):.1f} s" for run in (dense, sparse)), ""),
        (
            "perplexity",
            *(f"{math.exp(run.loss):.3f}" for run in (dense, sparse)),
            f"ratio {math.exp(sparse.loss - dense.loss):.4f}",
        ),
        ("top-1 agreement", "", "", f"{agreement:.1%}"),
        ("attention calls rewritten", "", f"{report.num_rewritten} of {len(report.sites)}", ""),
        ("blocks computed, mean", "100%", f"{statistics.mean(layers):.1%}", ""),
        ("blocks computed, by layer", "100%", f"{min(layers):.1%} to {max(layers):.1%}", ""),
    ]
    reasons = Counter(site.reason.value for site in report.sites if isinstance(site, Skipped))
    return "\n".join(
        [
            format_table(("", "dense", "sparse", "compared"), rows),
            *(f"left dense, {count} of {len(report.sites)}: {reason}" for reason, count in reasons.items()),
            f"dense goes on:  {dense.continuation!r}",
            f"sparse goes on: {sparse.continuation!r}",
        ]
    )


def _compare_times(dense_s: float, sparse_s: float) -> str:
    if sparse_s > dense_s:
        return f"{sparse_s / dense_s:.2f}x slower"
    return f"{dense_s / sparse_s:.2f}x faster"


def _format_time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _time(run: Callable[..., Any], tokens: Tensor) -> tuple[float, Any]:
    _synchronize(tokens)
    start = time.perf_counter()
    output = run(tokens, use_cache=True)
    _synchronize(tokens)
    return time.perf_counter() - start, output


def _synchronize(tokens: Tensor) -> None:
    if tokens.is_cuda:
        torch.cuda.synchronize(tokens.device)


def _continue(model: Any, tokenizer: Any, output: Any) -> str:
    """Decode greedily from the cache that the prefill filled."""
    chosen: list[int] = []
    while True:
        token = output.logits[:, -1:].argmax(-1)
        chosen.append(int(token))
        if len(chosen) == _CONTINUATION_TOKENS:
            return str(tokenizer.decode(chosen))
        output = model(token, past_key_values=output.past_key_values)
