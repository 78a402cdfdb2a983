"""Which rows of a call are observed, and by which op."""

from __future__ import annotations

import pytest
import torch

from flexprefill_compile.block_masks.observed_attention import sample_rows


@pytest.mark.parametrize(("count", "length"), [(1, 1), (7, 7), (50, 7), (7, 50), (64, 8192), (3, 2**20 + 1)])
def test_sampled_rows_are_spread_and_differ(count: int, length: int) -> None:
    rows = sample_rows(count, length, torch.device("cpu"))
    stretch = torch.arange(min(count, length), dtype=torch.float64) * length / min(count, length)
    assert len(rows) == min(count, length)
    assert (rows.diff() > 0).all()
    assert (rows >= stretch.long()).all()
    assert rows[-1] < length


def test_an_observed_call_passes_opcheck() -> None:
    query, key = torch.randn(1, 4, 64, 16), torch.randn(1, 2, 64, 16)
    tables = [torch.zeros(1, 4, 4, dtype=torch.int32), torch.zeros(1, 4, 4, 4, dtype=torch.int32)] * 2
    rows = sample_rows(8, 64, query.device)
    arguments = (
        torch.randn(1, 4, 64, 16),
        query,
        key,
        key,
        tables,
        [],
        None,
        rows,
        None,
        None,
        0.25,
        None,
        "attention",
    )
    torch.library.opcheck(torch.ops.flexprefill.observe.default, arguments)
