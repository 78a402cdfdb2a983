"""The comparisons as a table, and in words where sparse loses."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from ..text_table import format_table
from .comparison import Comparison
from .confidence import EVERYTHING, ConfidenceInterval
from .scoring import Score

_HEADER = ("task", "tokens", "estimator", "dense", "sparse", "difference", "95 % interval", "right, dense", "sparse")


def summarise(comparisons: Sequence[Comparison]) -> str:
    """Lay out a line for each comparison, and a sentence for each estimator."""
    ordered = sorted(comparisons, key=lambda comparison: comparison.length)
    tasks = list(dict.fromkeys(comparison.task for comparison in comparisons))
    ordered.sort(key=lambda comparison: tasks.index(comparison.task))
    table = format_table((*_HEADER, "blocks", "sparse is"), [_format_row(comparison) for comparison in ordered])
    estimators = dict.fromkeys(comparison.estimator for comparison in comparisons)
    verdicts = [describe(name, [c for c in ordered if c.estimator == name]) for name in estimators]
    return "\n".join([table, "", *verdicts])


def describe(estimator: str, comparisons: Sequence[Comparison]) -> str:
    """Say where an estimator loses to dense attention."""
    worse = [f"{c.task} at {c.length}" for c in comparisons if c.verdict == "worse"]
    where = f"worse than dense on {len(worse)} of {len(comparisons)}"
    mean = f"{statistics.fmean(c.density for c in comparisons):.0%} of blocks computed"
    return f"{estimator}: {where}{': ' if worse else ''}{', '.join(worse)}; {mean}"


def _format_row(comparison: Comparison) -> list[str]:
    return [
        comparison.task,
        str(comparison.length),
        comparison.estimator,
        *(f"{_mean(side, 'log_likelihood'):.3f}" for side in (comparison.dense, comparison.sparse)),
        f"{comparison.difference:+.3f}",
        _format_interval(comparison.interval),
        *(f"{_mean(side, 'accuracy'):.0%}" for side in (comparison.dense, comparison.sparse)),
        f"{comparison.density:.0%}",
        comparison.verdict,
    ]


def _format_interval(interval: ConfidenceInterval) -> str:
    return "one sample" if interval == EVERYTHING else f"{interval.low:+.3f} to {interval.high:+.3f}"


def _mean(scores: Iterable[Score], name: str) -> float:
    return statistics.fmean(getattr(score, name) for score in scores)
