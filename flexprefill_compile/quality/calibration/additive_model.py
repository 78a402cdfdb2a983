"""Predicts the loss of a setting as a sum over the parts of the model, for ``calibrate``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

# The rung of each part.
Levels = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class AdditiveModel:
    """Predicts the loss of a setting: each part has a share of the change in loss along the ladder.

    Attributes:
        rungs: The rungs used, cheap ones first.
        increases: Of the loss, with all parts on a rung; falls along ``rungs``.
        costs: (rungs, parts), of each part with all parts on a rung.
        shares: Of each part; not negative, sum 1, so that uniform settings are predicted as measured.
    """

    rungs: list[int]
    increases: list[float]
    costs: list[tuple[float, ...]]
    shares: list[float]

    def choose(self, max_increase: float) -> Levels:
        """Step up greedily; return the cheapest setting that is predicted to fit, at most one step off that way."""
        at = [0] * len(self.shares)
        increase = self.increases[0]
        fitting = [at] if increase <= max_increase else []
        while increase > max_increase and any(rung < len(self.rungs) - 1 for rung in at):
            steps = [(part, rung) for part in range(len(at)) for rung in range(at[part] + 1, len(self.rungs))]
            removed = [self._removed(part, at[part], rung) for part, rung in steps]
            fitting += [
                [*at[:part], rung, *at[part + 1 :]]
                for (part, rung), less in zip(steps, removed, strict=True)
                if increase - less <= max_increase
            ]
            number = max(range(len(steps)), key=lambda i: self._rate(steps[i][0], at[steps[i][0]], steps[i][1]))
            part, at_part = steps[number]
            at = [*at[:part], at_part, *at[part + 1 :]]
            increase -= removed[number]
        best = min(fitting, key=self._cost) if fitting else at
        return tuple(self.rungs[rung] for rung in best)

    def list_steps_down(self, levels: Levels) -> list[Levels]:
        """Return the settings with one part a rung lower, first those that save most cost for their loss."""
        at = [self.rungs.index(level) for level in levels]
        parts = [part for part in range(len(at)) if at[part] > 0]
        parts.sort(key=lambda part: (self._rate(part, at[part] - 1, at[part]), part))
        return [(*levels[:part], self.rungs[at[part] - 1], *levels[part + 1 :]) for part in parts]

    def _rate(self, part: int, low: int, high: int) -> float:
        """Return the loss that a part's move up removes for each unit of its cost."""
        added = self.costs[high][part] - self.costs[low][part]
        return self._removed(part, low, high) / added if added > 0 else math.inf

    def _removed(self, part: int, low: int, high: int) -> float:
        return self.shares[part] * (self.increases[low] - self.increases[high])

    def _cost(self, at: list[int]) -> float:
        return sum(self.costs[rung][part] for part, rung in enumerate(at))


def share_blame(increases: Sequence[float]) -> list[float]:
    """Turn the losses of single moves into shares; a part whose move seems to help has none."""
    blamed = [max(0.0, increase) for increase in increases]
    total = sum(blamed)
    return [increase / total if total > 0 else 1 / len(blamed) for increase in blamed]
