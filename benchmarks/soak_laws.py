"""What a soak has seen, minute by minute, and what must hold of it: results, graphs, memory and time."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence

import torch

# A leak of 10 KiB a prompt passes this where a second runs a prompt; one of an activation, within a minute.
MOST_MIB_PER_HOUR = 32.0
MOST_TENSORS_PER_HOUR = 60.0
# Of the prompts of the second half. A few kinds are so rare that they come late.
MOST_THAT_COMPILE = 0.01
# Other work on the machine makes single minutes slow, but hardly half of a quarter of them.
MOST_SLOWDOWN = 2.0
# A slope counts from so many standard errors on: memory comes and goes in steps.
STANDARD_ERRORS = 3.0


@dataclasses.dataclass(frozen=True)
class Record:
    """What was seen in a minute.

    Attributes:
        minute: When it ended, since the start.
        prompts: How many ran.
        tokens: Of these prompts, padding included.
        us_per_token: A compiled sparse prefill, microseconds, without what ran in threads; 0 if all did.
        resident_mib: Memory of the process.
        allocated_mib: Memory of live tensors on the GPU; 0 on a CPU.
        reserved_mib: Memory that torch keeps of the GPU; 0 on a CPU.
        tensors: Live tensors of Python.
        graphs: Compiled since the start.
        recordings: CUDA graphs recorded since the start.
        density: Mean share of the blocks that were computed at the default gamma; 0 where none is known.
        worst_error: Largest error at gamma 1, against eager, relative to the largest logit of a prompt.
        sparse_error: The same at the default gamma.
        faults: What did not hold, a sentence each.
    """

    minute: float
    prompts: int
    tokens: int
    us_per_token: float
    resident_mib: float
    allocated_mib: float
    reserved_mib: float
    tensors: int
    graphs: int
    recordings: int
    density: float
    worst_error: float
    sparse_error: float
    faults: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Slope:
    """How a figure grows with time.

    Attributes:
        per_hour: Its slope, at an equal number of graphs.
        error: One standard error of it, by the distances of the figures from the fit.
        per_graph: How much each graph adds; 0 if their number doesn't change.
    """

    per_hour: float
    error: float
    per_graph: float

    @property
    def certain(self) -> float:
        """How much of the slope the distances from the fit do not explain."""
        return self.per_hour - STANDARD_ERRORS * self.error


def fit_slope(records: Sequence[Record], name: str) -> Slope:
    """Fit a figure by time and by the number of graphs, least squares; fewer than five records give no slope."""
    if len(records) < 5:
        return Slope(0.0, 0.0, 0.0)
    values = torch.tensor([float(getattr(record, name)) for record in records]).double()
    hours = torch.tensor([record.minute / 60 for record in records]).double()
    graphs = torch.tensor([record.graphs for record in records]).double()
    columns = [hours, graphs] if graphs.unique().numel() > 1 else [hours]
    # Around their means, so that there is no constant to fit.
    design = torch.stack([column - column.mean() for column in columns], 1)
    inverse = torch.linalg.inv(design.mT @ design)
    weights = inverse @ design.mT @ (values - values.mean())
    distances = values - values.mean() - design @ weights
    variance = distances.square().sum() / (len(records) - len(columns) - 1)
    return Slope(float(weights[0]), math.sqrt(variance * inverse[0, 0]), float(weights[1:].sum()))


def take_second_half(records: Sequence[Record]) -> Sequence[Record]:
    """Return the records after half of the prompts, one at least; compilation takes most of the time before."""
    counts = list(itertools.accumulate(record.prompts for record in records))
    return [record for record, count in zip(records, counts, strict=True) if count > counts[-1] / 2]


def find_faults(records: Sequence[Record], tolerance: float, most_graphs: int, most_recordings: int) -> list[str]:
    """Return a sentence for each thing that does not hold.

    Args:
        records: At least one, in the order of time.
        tolerance: Largest error at gamma 1 that rounding explains.
        most_graphs: How many graphs there may be in all.
        most_recordings: How many CUDA graphs.
    """
    faults = [fault for record in records for fault in record.faults]
    if not max(record.sparse_error for record in records) > tolerance:
        faults.append(f"sparse attention is within {tolerance:.1e} of dense, so a wrong result would not be seen")
    return [
        *faults,
        *_judge_count(records, "graphs", most_graphs, "graphs were compiled"),
        *_judge_count(records, "recordings", most_recordings, "CUDA graphs were recorded"),
        *_judge_memory(records),
        *_judge_time(records),
    ]


def _judge_count(records: Sequence[Record], name: str, most: int, what: str) -> list[str]:
    later = take_second_half(records)
    first, last = (getattr(record, name) for record in (later[0], later[-1]))
    faults = [f"{last} {what}, more than {most}"] if last > most else []
    if last - first > MOST_THAT_COMPILE * sum(record.prompts for record in later):
        faults.append(f"{last - first} of {last} {what} in the second half")
    return faults


def _judge_memory(records: Sequence[Record]) -> list[str]:
    later = take_second_half(records)
    faults = []
    for name, most, what in (
        ("resident_mib", MOST_MIB_PER_HOUR, "MiB of memory"),
        ("allocated_mib", MOST_MIB_PER_HOUR, "MiB of live tensors on the GPU"),
        ("reserved_mib", MOST_MIB_PER_HOUR, "MiB reserved on the GPU"),
        ("tensors", MOST_TENSORS_PER_HOUR, "live tensors"),
    ):
        slope = fit_slope(later, name)
        if slope.certain > most:
            faults.append(
                f"{what} grew by {slope.per_hour:.0f} an hour in the second half, beside what graphs take "
                f"(standard error {slope.error:.0f}), more than {most:.0f}"
            )
    return faults


def _judge_time(records: Sequence[Record]) -> list[str]:
    timed = [record.us_per_token for record in take_second_half(records) if record.us_per_token]
    if len(timed) < 4:
        return []
    before, after = (statistics.median(part) for part in (timed[: len(timed) // 2], timed[len(timed) // 2 :]))
    if after <= MOST_SLOWDOWN * before:
        return []
    return [f"a token took {before:.0f} us, then {after:.0f} us at the end"]


HEADERS = (
    "minute",
    "prompts",
    "tokens",
    "us a token",
    "MiB",
    "GPU MiB live",
    "GPU MiB",
    "tensors",
    "graphs",
    "CUDA graphs",
    "density",
    "error, gamma 1",
    "error, sparse",
    "faults",
)


def format_record(record: Record) -> tuple[str, ...]:
    """Lay out a minute as a row under ``HEADERS``."""
    memory = (record.resident_mib, record.allocated_mib, record.reserved_mib)
    return (
        f"{record.minute:.1f}",
        f"{record.prompts}",
        f"{record.tokens}",
        f"{record.us_per_token:.1f}",
        *(f"{mib:.0f}" for mib in memory),
        *(f"{count}" for count in (record.tensors, record.graphs, record.recordings)),
        f"{record.density:.1%}" if record.density else "",
        f"{record.worst_error:.1e}",
        f"{record.sparse_error:.1e}",
        f"{len(record.faults)}",
    )
