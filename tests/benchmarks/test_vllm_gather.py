"""The benchmark of gathered pages: a prompt that is laid into pages comes out as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flexprefill_compile.integrations.vllm.pages import split_cache

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture
def gather(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import vllm_gather  # noqa: PLC0415

    return vllm_gather


def test_a_prompt_comes_out_of_its_pages(gather: Any) -> None:
    key, value = (torch.randn(1, 2, 64, gather.HEAD_DIM) for _ in range(2))
    cache, table = gather.fill_cache(key, value, 16)
    assert cache.shape == (2, 4, 16, 2, gather.HEAD_DIM)
    assert table.tolist() != sorted(table.tolist())
    found = gather.gather_both(*split_cache(cache, gather.HEAD_DIM), table, 40)
    torch.testing.assert_close(found, (key[:, :, :40], value[:, :, :40]), rtol=0, atol=0)


def test_heads_are_read(gather: Any) -> None:
    assert gather.heads("12,2") == (12, 2)
