"""Each method on one prompt of a real model: what its predictions lose, and what it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...quality.predictions import PredictionComparison, compare_predictions
from ..timing.clocks import average_middle_half
from .methods import Method
from .prefills import Cost, prefill_for_logits, prefill_for_time

Announce = Callable[[str], None]


class Loss(NamedTuple):
    """What a prefill's predictions lose.

    Attributes:
        predictions: Beside those of dense attention.
        density: Mean share of the causal blocks computed; 1 of dense attention and of a peer, which doesn't tell.
    """

    predictions: PredictionComparison
    density: float


@dataclasses.dataclass(frozen=True)
class Row:
    """What one method did on one prompt.

    Attributes:
        text: Name of the text.
        tokens: Length of the prompt.
        method: Name of the method.
        loss: Of its predictions, None if it failed.
        cost: Of its prefill, None if it failed.
        note: Why there are no figures, or empty.
    """

    text: str
    tokens: int
    method: str
    loss: Loss | None
    cost: Cost | None
    note: str = ""

    @property
    def figures(self) -> dict[str, float]:
        """Every figure by its name: KL and times in nats and milliseconds; none if the method failed."""
        if self.loss is None or self.cost is None:
            return {}
        predictions, density = self.loss
        return {
            "density": density,
            "divergence": predictions.divergence,
            "perplexity_ratio": predictions.perplexity_ratio,
            "agreement": predictions.agreement,
            **self.cost._asdict(),
        }


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
    losses: dict[str, Loss] = {}
    notes: dict[str, str] = {}
    dense_logits, _ = prefill_for_logits(model, tokens, methods[0])
    for method in methods:
        announce(f"{text}, {tokens.shape[1]} tokens: loss of {method.name}")
        try:
            logits, density = prefill_for_logits(model, tokens, method)
            losses[method.name] = Loss(compare_predictions(dense_logits, logits, tokens), density)
            del logits
        except torch.OutOfMemoryError:
            notes[method.name] = "out of memory"
        except Exception as error:  # a peer may fail in any way
            notes[method.name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:200]
    del dense_logits
    working = [method for method in methods if method.name in losses]
    announce(f"{text}, {tokens.shape[1]} tokens: times")
    costs = _time_in_rounds(model, tokens, working, rounds)
    where = (text, tokens.shape[1])
    return [
        Row(*where, method.name, losses.get(method.name), costs.get(method.name), notes.get(method.name, ""))
        for method in methods
    ]


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
