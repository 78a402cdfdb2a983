"""Which measured prompts would stay dense by default: a benchmark forces them to run sparse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..settings.config import SparsePrefillConfig
from ..settings.device_defaults import find_break_even_length, name_device, resolve_ceiling


def describe_defaults(rows: Sequence[Mapping[str, Any]], device: torch.device) -> list[str]:
    """Return a sentence for each reason why prompts that were measured sparse would run dense by default.

    Args:
        rows: Each with its "tokens"; those that were measured have a "density", and perhaps their "inputs".
        device: Where they ran.
    """
    measured = [row for row in rows if "density" in row]
    min_length = find_break_even_length(device)
    ceiling = resolve_ceiling(SparsePrefillConfig(), [torch.empty(0, device=device)], has_cuda_graphs=False)
    short = [row for row in measured if row["tokens"] < min_length]
    full = [
        row
        for row in measured
        if ceiling is not None
        and row["tokens"] >= max(min_length, ceiling.from_length)
        and row["density"] > ceiling.max_density
    ]
    lines = []
    if short:
        name = name_device(device)
        lines.append(f"dense by default, shorter than min_length ({min_length} on {name}): {_list(short)}")
    if full and ceiling is not None:
        lines.append(f"dense by default, over max_density ({ceiling.max_density:.0%} of the blocks): {_list(full)}")
    return lines


def _list(rows: Sequence[Mapping[str, Any]]) -> str:
    names = [f"{row['tokens']} {row.get('inputs', '')}".strip() for row in rows]
    return ", ".join(dict.fromkeys(names)) + " tokens" * ("inputs" not in rows[0])
