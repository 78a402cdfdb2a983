"""One task at one length with one estimator: dense and sparse side by side, and whether sparse loses."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from .confidence import EVERYTHING, ConfidenceInterval, compute_mean_interval, compute_share_interval
from .scoring import Score
from .table import TEXTS

# Nats a token that two exact computations of the same attention may differ by: less than this is no difference.
_ROUNDING = 1e-4


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Scores of the same samples, one for each.

    Attributes:
        task: Its name.
        length: Tokens of prompt and answer, at most.
        estimator: How sparse chose its blocks.
        depths: Where the answers stood; None where they stood everywhere.
        dense: Scores after dense prefill.
        sparse: Scores after sparse prefill.
        densities: Share of causal blocks that sparse computed, mean over the attention calls and heads.
    """

    task: str
    length: int
    estimator: str
    depths: Sequence[float | None]
    dense: Sequence[Score]
    sparse: Sequence[Score]
    densities: Sequence[float]

    @property
    def difference(self) -> float:
        """Log-likelihood a token, sparse minus dense, nats: mean over the samples."""
        return statistics.fmean(self._differences("log_likelihood"))

    @property
    def interval(self) -> ConfidenceInterval:
        """The 95 % interval of ``difference``."""
        return compute_mean_interval(self._differences("log_likelihood"))

    @property
    def accuracy_interval(self) -> ConfidenceInterval:
        """The 95 % interval of the accuracy, sparse minus dense."""
        if len(self.dense) < 2:
            return EVERYTHING
        if self.task in TEXTS:
            return compute_mean_interval(self._differences("accuracy"))
        dense, sparse = ([score.accuracy == 1 for score in side] for side in (self.dense, self.sparse))
        return compute_share_interval(dense, sparse)

    @property
    def density(self) -> float:
        """Share of causal blocks computed, mean over the samples."""
        return statistics.fmean(self.densities)

    @property
    def verdict(self) -> str:
        """``worse`` or ``better`` where an interval lies wholly on one side of zero, else ``no difference seen``."""
        if self.interval.is_below(-_ROUNDING) or self.accuracy_interval.is_below(0):
            return "worse"
        if self.interval.is_above(_ROUNDING) or self.accuracy_interval.is_above(0):
            return "better"
        return "no difference seen"

    def as_dict(self) -> dict[str, Any]:
        """Return everything, for JSON; an interval that says nothing is None."""
        return dataclasses.asdict(self) | {
            "difference": self.difference,
            "interval": _as_list(self.interval),
            "accuracy_interval": _as_list(self.accuracy_interval),
            "density": self.density,
            "verdict": self.verdict,
        }

    def _differences(self, name: str) -> list[float]:
        return [getattr(s, name) - getattr(d, name) for d, s in zip(self.dense, self.sparse, strict=True)]


def _as_list(interval: ConfidenceInterval) -> list[float] | None:
    return None if interval == EVERYTHING else [interval.low, interval.high]
