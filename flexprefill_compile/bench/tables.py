"""The figures of the benchmark as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..text_table import format_table
from .timing.rates import ATTENTION
from .timing.stages import SELECTION_STAGES


def format_totals(runs: Sequence[dict[str, Any]]) -> str:
    """Lay out each run in a line, and below the table why a run is missing.

    Times in milliseconds; "replayed" is a CUDA graph of the same call. The speed-up is over the fastest dense backend,
    "under the ceiling" in times of that backend, the two called in turn. "Not as plain" are blocks on which the kernels
    and plain PyTorch differ, as a share of the latter's.
    """
    measured = [run for run in runs if "note" not in run]
    notes = [f"{run['tokens']} {run['inputs']}: {run['note']}" for run in runs if "note" in run]
    if not measured:
        return "\n".join(notes)
    lines = [_describe(run) for run in measured]
    header = list(dict.fromkeys(name for line in lines for name in line))
    rows = [[line.get(name, "") for name in header] for line in lines]
    return "\n".join([format_table(header, rows), *notes])


def _describe(run: dict[str, Any]) -> dict[str, str]:
    fastest = min(run["dense_ms"].values())
    cells = {
        "tokens": str(run["tokens"]),
        "inputs": run["inputs"],
        "blocks": f"{run['density']:.1%}",
        "recall (p10)": f"{run['recall']['mean']:.3f} ({run['recall']['p10']:.3f})",
        "error": f"{run['error']:.3f}",
    }
    if (share := run.get("disagreement")) is not None:
        cells["not as plain"] = f"{share:.3%}"
    cells |= {f"dense {name}": f"{time:.2f}" for name, time in run["dense_ms"].items()}
    cells["dense flex"] = f"{run['dense_flex_ms']:.2f}"
    for name in ("selection", "sparse"):
        replayed = run.get(f"{name}_replayed_ms")
        cells[name] = f"{run[f'{name}_ms']:.3f}"
        cells |= {f"{name} replayed": f"{replayed:.3f}"} if replayed else {}
    cells["speed-up"] = f"{fastest / run['sparse_ms']:.2f}x"
    if "sparse_replayed_ms" in run:
        cells["replayed"] = f"{fastest / run['sparse_replayed_ms']:.2f}x"
        cells["peak"] = f"{run['sparse_peak_mib']:.0f} MiB"
    if ceiling := run.get("ceiling"):
        cells["under the ceiling"] = f"{ceiling['ms']:.2f} ({ceiling['ms'] / ceiling['dense_ms']:.3f} of dense)"
    for name, figures in run.get("peers", {}).items():
        cells[name] = f"{figures['ms']:.2f} (error {figures['error']:.3f})"
    return cells


def format_stages(runs: Sequence[dict[str, Any]]) -> str:
    """Lay out the stages that ran, in brackets how many times its floor a stage takes; "" without stages."""
    runs = [run for run in runs if "stages_ms" in run]
    if not runs:
        return ""
    header = ("stage, ms", *(f"{run['tokens']} {run['inputs']}" for run in runs))
    rows = []
    for stage in (*SELECTION_STAGES, ATTENTION):
        if not any(run["stages_ms"][stage] for run in runs):
            continue
        cells = []
        for run in runs:
            floor = run["floors_ms"].get(stage)
            time = run["stages_ms"][stage]
            cells.append(f"{time:.3f}" + (f" ({time / floor:.1f}x)" if floor else ""))
        rows.append([stage, *cells])
    speeds = [run.get("attention_flop_per_s") for run in runs]
    rows.append(["that in TFLOP/s", *("" if speed is None else f"{speed / 1e12:.0f}" for speed in speeds)])
    return format_table(header, rows)
