"""The figures of the benchmark as a picture: time over length, dense and sparse."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError


def check_plot(path: Path | None) -> None:
    """Check that a picture can be drawn; None is no picture.

    Raises:
        UsageError: The extra "plot" or the folder is missing, or the format is unknown.
    """
    if path is None:
        return
    formats = create_figure(1, "").canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in formats:
        raise UsageError(f"can't write the plot {path}: its name must end in one of {', '.join(sorted(formats))}")
    if not path.parent.is_dir():
        raise UsageError(f"can't write the plot {path}: there is no folder {path.parent}")


def create_figure(num_panels: int, title: str) -> Any:
    """Make a figure of panels side by side, with a title that fits over them.

    Raises:
        UsageError: The extra "plot" is missing.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  (needs the extra "plot")
    except ModuleNotFoundError as error:
        raise UsageError(f"--plot needs {error.name}: pip install 'flexprefill-compile[plot]'") from None
    figure = Figure(figsize=(5 * num_panels, 4.5), layout="constrained")
    figure.suptitle(textwrap.fill(title, 55 * num_panels), fontsize=11)
    return figure


def plot_runs(runs: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draw a panel for each kind of inputs.

    Args:
        runs: The figures.
        title: What was measured, where.
        path: Of the picture; its ending chooses the format.

    Raises:
        UsageError: The extra "plot" is missing, or the format is unknown.
    """
    measured = [run for run in runs if "note" not in run]
    kinds = list(dict.fromkeys(run["inputs"] for run in measured))
    figure = create_figure(max(1, len(kinds)), title)
    for number, kind in enumerate(kinds, start=1):
        axes = figure.add_subplot(1, len(kinds), number)
        own = [run for run in measured if run["inputs"] == kind]
        for name, points in _lines(own).items():
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(title=kind, xlabel="tokens", ylabel="ms", xscale="log", yscale="log")
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    try:
        figure.savefig(path)
    except (ValueError, OSError) as error:
        raise UsageError(f"can't write the plot {path}: {error}") from None


def _lines(runs: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Return the points, (tokens, milliseconds), of each line by its name."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for run in runs:
        times = {f"dense {name}": time for name, time in run["dense_ms"].items()}
        times |= {"dense flex": run["dense_flex_ms"], "selection": run["selection_ms"], "sparse": run["sparse_ms"]}
        times |= {"under the ceiling": run["ceiling"]["ms"]} if "ceiling" in run else {}
        times |= {name: figures["ms"] for name, figures in run.get("peers", {}).items()}
        for name, time in times.items():
            lines.setdefault(name, []).append((run["tokens"], time))
    return lines
