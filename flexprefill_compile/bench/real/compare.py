"""Each method on one prompt of a real model: what its predictions lose, and what it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ...quality.predictions import PredictionComparison, compare_predictions
from ..timing.clocks import average_middle_half
from .methods import Method
from .prefills import Cost, prefill_for_logits, prefill_for_time

Announce = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Row:
    """What one method did on one prompt.

    Attributes:
        text: Name of the text.
        tokens: Length of the prompt.
        method: Name of the method.
        divergence: Mean KL divergence of the next token's distribution from dense attention's, nats.
        perplexity_ratio: Perplexity over dense attention's.
        agreement: Share of positions with the same most likely token.
        density: Mean share of the causal blocks computed; None of a peer, which doesn't tell.
        attention_ms: Time of all attention calls.
        prefill_ms: Time of the whole prefill, to the logits of the last token.
        peak_mib: Memory at its peak, weights included; 0 on a CPU.
        note: Why there are no figures, or empty.
    """

    text: str
    tokens: int
    method: str
    divergence: float = 0.0
    perplexity_ratio: float = 1.0
    agreement: float = 1.0
    density: float | None = 1.0
    attention_ms: float = 0.0
    prefill_ms: float = 0.0
    peak_mib: float = 0.0
    note: str = ""


def compare_methods(
    model: nn.Module, tokens: Tensor, text: str, methods: Sequence[Method], rounds: int, announce: Announce
) -> list[Row]:
    """Measure each method beside the first, which is dense. Waits for the device.

    Losses come first, one prefill a method. Then prefills are timed in rounds, A-B and then B-A; a time is the mean
    of the middle half. A method that fails gets a note, and the others go on.

    Args:
        model: A Hugging Face causal language model, in inference.
        tokens: (1, S) int64, on its device.
        text: Name of the text.
        methods: The first is dense attention.
        rounds: Timed prefills of each.
        announce: Is told what is done next.
    """
    rows, notes = {}, {}
    dense_logits, _ = prefill_for_logits(model, tokens, methods[0])
    for method in methods:
        announce(f"{text}, {tokens.shape[1]} tokens: loss of {method.name}")
        try:
            logits, density = prefill_for_logits(model, tokens, method)
            rows[method.name] = _describe_loss(compare_predictions(dense_logits, logits, tokens), density)
            del logits
        except torch.OutOfMemoryError:
            notes[method.name] = "out of memory"
        except Exception as error:  # a peer may fail in any way
            notes[method.name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:200]
    del dense_logits
    working = [method for method in methods if method.name in rows]
    announce(f"{text}, {tokens.shape[1]} tokens: times")
    costs = _time_in_rounds(model, tokens, working, rounds)
    return [
        Row(text, tokens.shape[1], method.name, note=notes[method.name])
        if method.name in notes
        else Row(text, tokens.shape[1], method.name, **rows[method.name], **costs[method.name]._asdict())
        for method in methods
    ]


def _describe_loss(comparison: PredictionComparison, density: float) -> dict[str, float]:
    return {
        "divergence": comparison.divergence,
        "perplexity_ratio": comparison.perplexity_ratio,
        "agreement": comparison.agreement,
        "density": density,
    }


def _time_in_rounds(model: nn.Module, tokens: Tensor, methods: Sequence[Method], rounds: int) -> dict[str, Cost]:
    costs: dict[str, list[Cost]] = {method.name: [] for method in methods}
    for method in methods:  # warms up
        prefill_for_time(model, tokens, method)
    for number in range(rounds):
        for method in methods if number % 2 == 0 else methods[::-1]:
            costs[method.name].append(prefill_for_time(model, tokens, method))
    return {
        name: Cost(*(average_middle_half(figures) for figures in zip(*found, strict=True)))
        for name, found in costs.items()
    }
