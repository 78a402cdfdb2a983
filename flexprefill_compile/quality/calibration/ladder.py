"""The search of ``calibrate``: a rung of a ladder of settings for each part of a model, as cheap as a bound allows.

    every rung, all parts on it       how loss falls and cost rises along the ladder; rungs that cost more and lose
                                      more than another leave it
    one part at a time moved down     how much of the loss each part is to blame for
    greedy                            the step that removes most loss for its cost, until the predicted loss fits
    measured                          predictions are corrected by what the whole setting really loses
    single steps down                 while runs remain and the bound holds

Loss is predicted as a sum over the parts; what is chosen has always been measured as a whole. A measurement is a
callable, so that nothing here knows of models.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from .additive_model import AdditiveModel, Levels, share_blame

# The probe that tells parts apart moves them so many rungs below the cheapest uniform rung that fits.
_PROBE_STEPS = 2
_CORRECTIONS = 6
_FAILED_STEPS = 8


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one setting of the whole model loses and costs.

    Attributes:
        loss_increase: Mean loss less that of dense attention, nats.
        costs: What each part computes, as a share of what dense attention computes in the whole model.
    """

    loss_increase: float
    costs: tuple[float, ...]

    @property
    def cost(self) -> float:
        """Of the whole model: 1 is dense."""
        return sum(self.costs)


Measure = Callable[[Levels], Measurement]


class Search:
    """One search; ``run`` returns what it chose.

    Attributes:
        measured: Every setting measured so far, each once.
    """

    def __init__(
        self, measure: Measure, num_parts: int, num_rungs: int, max_increase: float, max_runs: int = 100
    ) -> None:
        """Prepare a search.

        Args:
            measure: Measures a setting, the rung of each part; the last rung is dense and is never measured for all.
            num_parts: Parts of the model that are set apart: its layers, or groups of them.
            num_rungs: Rungs of the ladder, cheap ones first.
            max_increase: Bound on the increase of the loss, nats.
            max_runs: Measurements at most, and at least one each for the rungs and the parts.
        """
        self._measure = measure
        self.num_parts, self.num_rungs = num_parts, num_rungs
        self.max_increase, self.max_runs = max_increase, max_runs
        dense = Measurement(0.0, (1 / num_parts,) * num_parts)
        self.measured: dict[Levels, Measurement] = {self._uniform(num_rungs - 1): dense}

    def run(self) -> tuple[Levels, Measurement]:
        """Return the cheapest setting measured within the bound, and its measurement."""
        for rung in range(self.num_rungs - 1):
            self._try(self._uniform(rung))
        rungs = self._find_useful_rungs()
        if self.best[0] != self._uniform(rungs[0]):
            model = self._fit(rungs)
            self._approach(model)
            self._step_down(model)
        return self.best

    @property
    def best(self) -> tuple[Levels, Measurement]:
        """The cheapest setting so far that keeps the bound; dense if there is no other."""
        fitting = (item for item in self.measured.items() if item[1].loss_increase <= self.max_increase)
        return min(fitting, key=lambda item: (item[1].cost, item[0]))

    def better_of(self, measurement: Measurement) -> Measurement:
        """Return the best so far once a measurement under way counts too."""
        best = self.best[1]
        fits = measurement.loss_increase <= self.max_increase and measurement.cost < best.cost
        return measurement if fits else best

    def _uniform(self, rung: int) -> Levels:
        return (rung,) * self.num_parts

    def _try(self, levels: Levels) -> Measurement:
        if levels not in self.measured:
            self.measured[levels] = self._measure(levels)
        return self.measured[levels]

    def _has_runs(self) -> bool:
        return len(self.measured) <= self.max_runs

    def _find_useful_rungs(self) -> list[int]:
        """Return the rungs, cheap ones first, that lose less than all that cost less; those of no finite loss go."""
        uniform = [self.measured[self._uniform(rung)] for rung in range(self.num_rungs)]
        useful: list[int] = []
        least = math.inf
        for rung in sorted(range(self.num_rungs), key=lambda rung: (uniform[rung].cost, uniform[rung].loss_increase)):
            if uniform[rung].loss_increase < least:
                useful.append(rung)
                least = uniform[rung].loss_increase
        return useful

    def _fit(self, rungs: list[int]) -> AdditiveModel:
        """Measure how much of the loss each part is to blame for, by moving one at a time."""
        uniform = [self.measured[self._uniform(rung)] for rung in rungs]
        fits = [number for number, each in enumerate(uniform) if each.loss_increase <= self.max_increase]
        base = fits[0] if fits else len(rungs) - 1
        probe = max(0, base - _PROBE_STEPS)
        increases = []
        for part in range(self.num_parts):
            levels = [rungs[base]] * self.num_parts
            levels[part] = rungs[probe]
            increases.append(self._try(tuple(levels)).loss_increase - uniform[base].loss_increase)
        return AdditiveModel(
            rungs, [each.loss_increase for each in uniform], [each.costs for each in uniform], share_blame(increases)
        )

    def _approach(self, model: AdditiveModel) -> None:
        """Measure what the model predicts to fit; scale its predictions by what came out; again."""
        goal, largest_fitting, smallest_failing = self.max_increase, 0.0, math.inf
        for _ in range(_CORRECTIONS):
            if not self._has_runs():
                return
            increase = self._try(model.choose(goal)).loss_increase
            if increase <= self.max_increase:
                largest_fitting = max(largest_fitting, goal)
            else:
                smallest_failing = min(smallest_failing, goal)
            goal *= min(2.0, max(0.5, self.max_increase / increase)) if increase > 0 else 2.0
            if not largest_fitting < goal < smallest_failing:
                if smallest_failing == math.inf:
                    return
                goal = (largest_fitting + smallest_failing) / 2

    def _step_down(self, model: AdditiveModel) -> None:
        """From the best setting, move single parts one rung down, the most promising first, while the bound holds."""
        failures = 0
        while failures < _FAILED_STEPS and self._has_runs():
            levels, current = self.best
            steps = [step for step in model.list_steps_down(levels) if step not in self.measured]
            if not steps:
                return
            step = self._try(steps[0])
            failures += step.loss_increase > self.max_increase or step.cost >= current.cost
