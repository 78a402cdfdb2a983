"""Curves of perplexity ratio over density, out of measured points: interpolated, compared, tabulated, drawn."""

from __future__ import annotations

import bisect
import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

DENSITIES = (0.15, 0.2, 0.25, 0.3, 0.4, 0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One setting, measured on one text.

    Attributes:
        text: Its name.
        tokens: Its length.
        estimator: How blocks were chosen.
        gamma: As in ``SparsePrefillConfig``.
        min_budget: Likewise.
        block_size: Likewise.
        density: Mean share of the causal blocks computed, over layers and heads.
        ratio: Perplexity over that with dense attention.
    """

    text: str
    tokens: int
    estimator: str
    gamma: float
    min_budget: int
    block_size: int
    density: float
    ratio: float


class Task(NamedTuple):
    """What points must share to be compared."""

    text: str
    tokens: int


class Method(NamedTuple):
    """What a curve belongs to."""

    estimator: str
    block_size: int


LINE_STYLES = ("-", "--", ":")


class Curve:
    """The best that a method's settings give: the lowest ratio at up to each density.

    Attributes:
        knots: (density, ratio) of the settings that no other beats in both, densities ascending, ratios falling.
    """

    def __init__(self, points: Iterable[Point]) -> None:
        self.knots: list[tuple[float, float]] = []
        for density, ratio in sorted((point.density, point.ratio) for point in points):
            if not self.knots or ratio < self.knots[-1][1]:
                self.knots.append((density, ratio))

    def at(self, density: float) -> float:
        """Return the ratio at up to a density: between two settings in proportion, NaN below the sparsest."""
        after = bisect.bisect_right(self.knots, (density, math.inf))
        if after == 0:
            return math.nan
        (low, ratio) = self.knots[after - 1]
        if after == len(self.knots):
            return ratio
        (high, next_ratio) = self.knots[after]
        return ratio + (next_ratio - ratio) * (density - low) / (high - low)


Curves = dict[Task, dict[Method, Curve]]


def group_curves(points: Sequence[Point]) -> Curves:
    """Return the curve of each method on each text and length."""
    groups: dict[Task, dict[Method, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for point in points:
        groups[Task(point.text, point.tokens)][Method(point.estimator, point.block_size)].append(point)
    return {
        task: {method: Curve(found) for method, found in sorted(methods.items())}
        for task, methods in sorted(groups.items(), key=lambda item: (item[0].tokens, item[0].text))
    }


def find_largest_excess(curve: Curve, other: Curve) -> tuple[float, float] | None:
    """Find where a curve lies highest above another, over all densities that both reach.

    Both are straight between their knots, so that it is enough to look there.

    Returns:
        The excess of the ratio, negative where the curve is lower throughout, and its density; None if a curve is
        empty.
    """
    if not curve.knots or not other.knots:
        return None
    start = max(curve.knots[0][0], other.knots[0][0])
    densities = {start, *(density for density, _ in curve.knots + other.knots if density > start)}
    return max((curve.at(density) - other.at(density), density) for density in densities)


def compare_methods(curves: Curves, estimator: str, other: str, tolerance: float) -> tuple[bool, str]:
    """Say whether an estimator is anywhere worse than another, at equal density, text, length and block size.

    Args:
        curves: Of all.
        estimator: The one in question.
        other: What it is held against.
        tolerance: Excess of the ratio that counts as equal.

    Returns:
        Whether it is nowhere worse, and the sentence that says so, or where it is.
    """
    excesses = []
    for task, methods in curves.items():
        for method, curve in methods.items():
            against = methods.get(Method(other, method.block_size))
            if method.estimator == estimator and against is not None:
                found = find_largest_excess(curve, against)
                if found is not None:
                    excesses.append((*found, task, method.block_size))
    if not excesses:
        return False, f"{estimator} and {other} have no points in common"
    worse = [each for each in excesses if each[0] > tolerance]
    excess, density, task, block_size = max(excesses)
    where = f"{excess:+.4f} in ratio at density {density:.3f} of {task.text}, {task.tokens} tokens, blocks {block_size}"
    if worse:
        return False, f"{estimator} is worse than {other} on {len(worse)} of {len(excesses)} curves: at most {where}"
    return True, f"nowhere is {estimator} worse than {other} ({len(excesses)} curves; closest {where})"


def format_curves(curves: Curves) -> str:
    """Write the curves as a Markdown table: the ratio of each method at a few densities, and its mean over texts."""
    rows = []
    for tokens in dict.fromkeys(task.tokens for task in curves):
        texts = {task.text: methods for task, methods in curves.items() if task.tokens == tokens}
        for text, methods in texts.items():
            rows += [(tokens, text, method, [curve.at(d) for d in DENSITIES]) for method, curve in methods.items()]
        shared = [method for method in next(iter(texts.values())) if all(method in each for each in texts.values())]
        if len(texts) > 1:
            rows += [(tokens, "mean", method, _mean_over(texts.values(), method)) for method in shared]
    lines = [
        "| tokens | text | estimator | blocks | " + " | ".join(f"at {density:.2f}" for density in DENSITIES) + " |",
        "|---" * (4 + len(DENSITIES)) + "|",
    ]
    lines += [
        f"| {tokens} | {text} | {method.estimator} | {method.block_size} | "
        + " | ".join("-" if math.isnan(ratio) else f"{ratio:.4f}" for ratio in ratios)
        + " |"
        for tokens, text, method, ratios in rows
    ]
    return "\n".join(lines)


def _mean_over(texts: Iterable[dict[Method, Curve]], method: Method) -> list[float]:
    """Return the geometric means over the texts."""
    curves = [methods[method] for methods in texts]
    return [math.exp(statistics.fmean(math.log(curve.at(density)) for curve in curves)) for density in DENSITIES]


def plot_curves(curves: Curves, points: Sequence[Point], path: Path) -> None:
    """Draw each text and length: the points of each method, and its curve through the best of them."""
    import matplotlib as mpl  # noqa: PLC0415  (of the extra "plot")

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    texts = list(dict.fromkeys(task.text for task in curves))
    lengths = list(dict.fromkeys(task.tokens for task in curves))
    methods = {method for each in curves.values() for method in each}
    estimators = sorted({method.estimator for method in methods} - {"oracle"})
    block_sizes = sorted({method.block_size for method in methods}, reverse=True)
    figure, grid = plt.subplots(
        len(texts), len(lengths), figsize=(4.5 * len(lengths) + 1, 3.4 * len(texts) + 0.6), squeeze=False, sharey="row"
    )
    for task, found in curves.items():
        axes = grid[texts.index(task.text)][lengths.index(task.tokens)]
        for method, curve in found.items():
            color = "black" if method.estimator == "oracle" else f"C{estimators.index(method.estimator)}"
            style = LINE_STYLES[block_sizes.index(method.block_size) % len(LINE_STYLES)]
            own = [p for p in points if Task(p.text, p.tokens) == task and Method(p.estimator, p.block_size) == method]
            axes.scatter([p.density for p in own], [p.ratio for p in own], s=4, color=color, alpha=0.3)
            label = method.estimator if len(block_sizes) == 1 else f"{method.estimator}, blocks {method.block_size}"
            axes.plot(*zip(*curve.knots, strict=True), color=color, linestyle=style, label=label, linewidth=1.3)
        axes.set(title=f"{task.text}, {task.tokens} tokens", xlabel="density", ylim=(0.995, 1.1), xlim=(0, 1))
        axes.axhline(1, color="grey", linewidth=0.6)
    for row in grid:
        row[0].set_ylabel("perplexity / dense")
    grid[0][-1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
