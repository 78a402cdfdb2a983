"""Record the densities of a prefill's selections, from outside the compiled graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor

from .layout import BlockTables, compute_density

_recordings: dict[int, list[Tensor]] = {}  # by identity: two that began together are equal


@contextlib.contextmanager
def record_densities() -> Iterator[list[Tensor]]:
    """Collect the density of every selection made meanwhile, by any thread, in the order of the attention calls.

    A density is a (B, H) float tensor, the share of the blocks under its mask that a head computes, on the device of
    the selection. No GPU sync. Replayed CUDA graphs run no Python and are not recorded.
    """
    recording: list[Tensor] = []
    _recordings[id(recording)] = recording
    try:
        yield recording
    finally:
        del _recordings[id(recording)]


def record(tables: BlockTables, possible: Tensor | None = None) -> None:
    """Add a selection to the recordings under way.

    Args:
        tables: The selection.
        possible: As of ``compute_density``.
    """
    if _recordings:
        density = compute_density(tables, possible)
        for recording in tuple(_recordings.values()):
            recording.append(density)
