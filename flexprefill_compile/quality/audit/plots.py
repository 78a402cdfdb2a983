"""The pictures of an audit: layers by heads, the blocks of the worst heads, density by prompt length.

This module needs matplotlib: without it, its import raises ``UsageError``, which says what to install.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...errors import UsageError
from .attention_call import BlockPicture
from .report import AuditReport

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError as error:
    raise UsageError(f"plots need {error.name}, of the extra 'plot': pip install 'flexprefill-compile[plot]'") from None

_PICTURES = 4
# Attention less than this is drawn as nothing.
_LEAST_SHARE = 1e-4


def save_plots(report: AuditReport, folder: str | Path) -> list[Path]:
    """Draw a report into a folder, made if need be; needs matplotlib, the extra "plot".

    Returns:
        The files: heads.png, blocks.png, and length.png if the density of shorter prompts was measured.

    Raises:
        UsageError: The folder can't be written.
    """
    folder = Path(folder)
    figures = {"heads.png": _draw_heads(report)}
    if report.pictures:
        figures["blocks.png"] = _draw_blocks(report)
    if len(report.shorter_prompts) > 1:
        figures["length.png"] = _draw_lengths(report)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(folder / name, dpi=80)
    except OSError as error:
        raise UsageError(f"can't write plots to {folder}: {error.strerror}") from None
    return [folder / name for name in figures]


def _draw_heads(report: AuditReport) -> Figure:
    """Draw density and recall of every head of every attention call, side by side."""
    num_calls, num_heads = len(report.calls), max(len(call.heads) for call in report.calls)
    figure = _create_figure(11, 2 + 0.16 * num_calls)
    fields = (("density", "share of blocks computed"), ("recall_mean", "attention recall, mean"))
    for axes, (field, title) in zip(figure.subplots(1, 2), fields, strict=True):
        values = torch.full((num_calls, num_heads), torch.nan)
        for row, call in enumerate(report.calls):
            values[row, : len(call.heads)] = torch.tensor([getattr(head, field) for head in call.heads])
        colours = {"vmin": 0, "cmap": "viridis"} if field == "density" else {"cmap": "magma"}
        image = axes.imshow(values.numpy(), vmax=1, aspect="auto", interpolation="nearest", **colours)
        axes.set(title=title, xlabel="head", ylabel="attention call")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=axes)
    return figure


def _draw_blocks(report: AuditReport) -> Figure:
    """Draw where the heads of least recall look: in blue what is computed, in red what is left out."""
    pictures = sorted(report.pictures, key=lambda picture: _recall(report, picture))[:_PICTURES]
    figure = _create_figure(11, 5 * ((len(pictures) + 1) // 2))
    for axes, picture in zip(figure.subplots(-(-len(pictures) // 2), 2, squeeze=False).flat, pictures, strict=False):
        _draw_picture(figure, axes, picture, _recall(report, picture))
    for axes in figure.axes:
        axes.set_visible(axes.has_data())
    return figure


def _draw_lengths(report: AuditReport) -> Figure:
    """Draw the share of blocks computed by prompt length."""
    figure = _create_figure(6, 4)
    axes = figure.subplots()
    lengths, densities = zip(*sorted(report.shorter_prompts.items()), strict=True)
    axes.plot(lengths, densities, marker="o")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set(title="density by prompt length", xlabel="tokens", ylabel="share of blocks computed", ylim=(0, 1))
    axes.grid(alpha=0.3)
    return figure


def _create_figure(width: float, height: float) -> Figure:
    """Make a figure that needs no display; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _recall(report: AuditReport, picture: BlockPicture) -> float:
    call = report.calls[[id(other) for other in report.pictures].index(id(picture))]
    return call.heads[picture.head].recall_mean


def _draw_picture(figure: Figure, axes: Any, picture: BlockPicture, recall: float) -> None:
    last_row, num_blocks = int(picture.rows[-1]) + 1, picture.attention.shape[1]
    extent = (0, num_blocks * picture.block_size, last_row, 0)
    placing: dict[str, Any] = {"extent": extent, "aspect": "auto", "interpolation": "nearest"}
    drawn = picture.attention >= _LEAST_SHARE
    norm = LogNorm(_LEAST_SHARE, 1)
    for is_shown, colours, label in (
        (~picture.is_selected, "Reds", "attention of a block left out"),
        (picture.is_selected, "Blues", "attention of a block computed"),
    ):
        shares = picture.attention.masked_fill(~(drawn & is_shown), torch.nan)
        image = axes.imshow(shares.numpy(), norm=norm, cmap=colours, **placing)
        figure.colorbar(image, ax=axes, label=label, pad=0.02)
    axes.set(title=f"{picture.name}, head {picture.head}: recall {recall:.3f}", xlabel="key", ylabel="query")
