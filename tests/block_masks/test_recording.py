"""``record_densities``, of which several may be under way."""

from __future__ import annotations

import contextlib

import torch

from flexprefill_compile.block_masks import record_densities
from flexprefill_compile.block_masks.layout import BlockTables
from flexprefill_compile.block_masks.recording import record

TABLES = BlockTables(*(torch.ones(shape, dtype=torch.int32) for shape in ((1, 2, 3), (1, 2, 3, 1)) * 2))


def test_the_inner_recording_ends_and_the_outer_one_goes_on() -> None:
    with record_densities() as outer:
        with record_densities() as inner:
            record(TABLES)
        record(TABLES)
    record(TABLES)
    assert [density.shape for density in inner] == [(1, 2)]
    assert [density.shape for density in outer] == [(1, 2), (1, 2)]


def test_recordings_end_in_any_order() -> None:
    """As those of two threads do, which may have begun at once."""
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    recorded = [stack.enter_context(record_densities()) for stack in (first, second)]
    record(TABLES)
    second.close()
    record(TABLES)
    first.close()
    record(TABLES)
    assert [len(densities) for densities in recorded] == [2, 1]
