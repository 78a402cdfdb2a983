"""``flexprefill bench``: the attention of one layer, by stage, beside dense attention, the floors and any peer."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..bench.inputs.inputs import create_inputs
from ..bench.inputs.saved_inputs import SAVED, load_inputs
from ..bench.measure import measure
from ..bench.peers import Peer, load_peer
from ..bench.plot import plot_runs
from ..bench.rates import measure_rates
from ..bench.tables import format_stages, format_totals
from ..errors import UsageError
from ..report import AttentionSkippedError
from ..settings.config import SparsePrefillConfig
from ..settings.device_defaults import name_device


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchPlan:
    """What to measure.

    Attributes:
        device: "cuda" or "cpu".
        inputs: Kinds, as ``create_inputs`` takes them.
        saved: A file of inputs to measure as well, as ``load_inputs`` takes it, or None.
        lengths: In tokens.
        heads: Of queries and keys.
        head_dim: Of all.
        config: What to select; see ``measure``.
        calls: Timed calls of each kind, at most.
        model: Where "real" inputs come from; None is SmolLM2.
        peers: As ``module:function``.
        json_path: A file for all figures, or None.
        plot_path: A file for a picture, or None.
    """

    device: str
    inputs: Sequence[str]
    lengths: Sequence[int]
    heads: Sequence[int]
    head_dim: int
    config: SparsePrefillConfig
    calls: int
    model: Path | None = None
    peers: Sequence[str] = ()
    json_path: Path | None = None
    plot_path: Path | None = None
    saved: Path | None = None


def run_bench(plan: BenchPlan) -> None:
    """Measure, print a table of totals and one of stages, and write the files that were asked for.

    A row that doesn't fit into memory, that a model or file can't give or that stays dense gets a note, not figures.

    Raises:
        UsageError: The device isn't there, the heads don't match, or a peer or file won't do.
    """
    check_device(plan.device)
    if plan.heads[0] % plan.heads[1]:
        raise UsageError(f"query heads must be a multiple of key heads, got {plan.heads[0]} and {plan.heads[1]}")
    peers = {path: load_peer(path) for path in plan.peers}
    dtype = torch.bfloat16 if plan.device == "cuda" else torch.float32
    rates = measure_rates(plan.device, dtype)
    name = name_device(torch.device(plan.device))
    title = f"{name}, torch {torch.__version__}, {dtype}, heads {list(plan.heads)}, head dim {plan.head_dim}"
    print(title)
    print(f"{plan.config}\ncopies at {rates['copy'] / 1e9:.0f} GB/s, products at {rates['product'] / 1e9:.0f} GFLOP/s")
    runs: list[dict[str, Any]] = []
    kinds = [*plan.inputs, *([SAVED] if plan.saved else [])]
    for length in plan.lengths:
        for kind in kinds:
            runs.append({"tokens": length, "inputs": kind} | _measure_row(plan, kind, length, dtype, rates, peers))
            _free_memory()
            if plan.json_path:  # after each row: what is measured stays if a later one breaks
                plan.json_path.write_text(json.dumps({"device": title, "rates": rates, "runs": runs}, indent=1) + "\n")
    print(format_totals(runs))
    if stages := format_stages(runs):
        print(stages)
    if plan.plot_path:
        plot_runs(runs, title, plan.plot_path)


def check_device(device: str) -> None:
    """Check that a device is one to measure on, and there.

    Raises:
        UsageError: It isn't.
    """
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UsageError(f"device must be cpu or cuda, and there, got {device}")


def _measure_row(
    plan: BenchPlan, kind: str, length: int, dtype: torch.dtype, rates: dict[str, float], peers: dict[str, Peer]
) -> dict[str, Any]:
    try:
        if kind == SAVED and plan.saved is not None:
            inputs = load_inputs(plan.saved, length, plan.device, dtype)
        else:
            inputs = create_inputs(kind, plan.heads, length, plan.head_dim, plan.device, dtype, plan.model)
        with torch.no_grad():
            return measure(inputs, plan.config, rates, plan.calls, peers)
    except torch.OutOfMemoryError as error:
        return {"note": f"out of memory: {str(error).partition('.')[0]}"}
    except (UsageError, AttentionSkippedError) as error:
        return {"note": str(error)}


def _free_memory() -> None:
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
