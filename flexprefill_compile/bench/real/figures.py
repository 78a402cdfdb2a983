"""The comparison as a table, and as a picture: time over loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...errors import UsageError
from ...text_table import format_table
from ..plot import create_figure
from .compare import Row


def format_rows(rows: Sequence[Row], dense: str) -> str:
    """Lay out each method in a line, and below the table why one is missing.

    Args:
        rows: Of any texts and lengths.
        dense: Name of the method whose times the speed-ups are over.
    """
    measured = [row for row in rows if row.figures]
    base = {(row.text, row.tokens): row for row in measured if row.method == dense}
    lines = [_describe(row, base[row.text, row.tokens].figures) for row in measured]
    notes = [f"{row.text} {row.tokens} {row.method}: {row.note}" for row in rows if row.note]
    if not lines:
        return "\n".join(notes)
    return "\n".join([format_table(list(lines[0]), [list(line.values()) for line in lines]), *notes])


def _describe(row: Row, base: dict[str, float]) -> dict[str, str]:
    own = row.figures
    return {
        "text": row.text,
        "tokens": str(row.tokens),
        "method": row.method,
        "blocks": f"{own['density']:.1%}",
        "KL": f"{max(own['divergence'], 0):.4f}",
        "ppl ratio": f"{own['perplexity_ratio']:.4f}",
        "top-1": f"{own['agreement']:.1%}",
        "attention ms": f"{own['attention_ms']:.1f}",
        "faster": f"{base['attention_ms'] / own['attention_ms']:.2f}x",
        "prefill ms": f"{own['prefill_ms']:.1f}",
        "prefill faster": f"{base['prefill_ms'] / own['prefill_ms']:.2f}x",
        "peak MiB": f"{own['peak_mib']:.0f}" if own["peak_mib"] else "",
    }


def plot_rows(rows: Sequence[Row], dense: str, title: str, path: Path) -> None:
    """Draw attention time, as a share of dense attention's, over KL from dense: a panel for each text and length.

    Raises:
        UsageError: The extra "plot" is missing, or the format is unknown.
    """
    prompts = list(dict.fromkeys((row.text, row.tokens) for row in rows))
    figure = create_figure(len(prompts), title)
    for number, (text, tokens) in enumerate(prompts, start=1):
        axes = figure.add_subplot(1, len(prompts), number)
        own = {row.method: row.figures for row in rows if (row.text, row.tokens) == (text, tokens) and row.figures}
        for method, figures in own.items():
            if not method.startswith("dense"):
                share = figures["attention_ms"] / own[dense]["attention_ms"]
                axes.plot(figures["divergence"], share, marker="o", linestyle="", label=method)
        axes.axhline(1, color="grey", linewidth=1)
        axes.set(title=f"{text}, {tokens} tokens", xlabel="KL from dense, nats", ylabel=f"time / {dense}")
        axes.set(xscale="log", yscale="log")
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize="x-small")
    try:
        figure.savefig(path)
    except (ValueError, OSError) as error:
        raise UsageError(f"can't write the plot {path}: {error}") from None
