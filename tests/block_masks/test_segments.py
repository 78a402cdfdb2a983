"""Sums and selections over segments, against each segment alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexprefill_compile.block_masks.segments import Segments, logsumexp_segments, sum_segments
from flexprefill_compile.block_masks.select import select_cumulative


def list_segments(lengths: list[int]) -> Segments:
    """Return segments of these lengths, (N,)."""
    sizes = torch.tensor(lengths)
    stops = sizes.cumsum(0)
    return Segments((stops - sizes).repeat_interleave(sizes), (stops - 1).repeat_interleave(sizes))


def join(parts: list[Tensor], *, each: int | list[int] = 1) -> Tensor:
    counts = [each] * len(parts) if isinstance(each, int) else each
    return torch.cat([part.expand(2, 3, n * part.shape[-1]) for part, n in zip(parts, counts, strict=True)], -1)


lengths = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32), lengths=lengths, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_each_run_is_reduced_on_its_own(seed: int, lengths: list[int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, sum(lengths), generator=generator, dtype=dtype) * 30
    x[..., 0] = -torch.inf
    expected = join([part.logsumexp(-1, keepdim=True) for part in x.split(lengths, -1)], each=lengths)
    torch.testing.assert_close(logsumexp_segments(x, list_segments(lengths)), expected)
    x[..., 0] = 1
    expected = join([part.sum(-1, keepdim=True) for part in x.split(lengths, -1)], each=lengths)
    torch.testing.assert_close(sum_segments(x, list_segments(lengths)), expected)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32), lengths=lengths, gamma=st.integers(1, 64).map(lambda n: n / 64))
def test_each_run_is_selected_on_its_own(seed: int, lengths: list[int], gamma: float) -> None:
    """Whole numbers, so that ties occur and every sum is exact."""
    generator = torch.Generator().manual_seed(seed)
    mass = torch.randint(0, 4, (2, 3, sum(lengths)), generator=generator).double()
    expected = torch.cat([select_cumulative(part, gamma) for part in mass.split(lengths, -1)], -1)
    assert torch.equal(select_cumulative(mass, gamma, list_segments(lengths)), expected)


def test_what_lies_behind_the_last_element_of_a_run_is_neutral() -> None:
    segments = Segments(torch.tensor([0, 0, 0, 3]), torch.tensor([1, 1, 1, 3]))
    mass = torch.tensor([1.0, 3.0, 0.0, 2.0])
    assert sum_segments(mass, segments).tolist() == [4, 4, 4, 2]
    assert select_cumulative(mass, 0.7, segments).tolist() == [False, True, False, True]
    assert select_cumulative(mass, 0.8, segments).tolist() == [True, True, False, True]


@pytest.mark.parametrize("gamma", [0.5, 0.95])
def test_small_runs_beside_large_ones_lose_nothing(gamma: float) -> None:
    small = torch.rand(50, dtype=torch.float64) * 1e-6
    mass = torch.cat([torch.full((50,), 1e3, dtype=torch.float64), small, torch.full((50,), 1e3, dtype=torch.float64)])
    selected = select_cumulative(mass.float(), gamma, list_segments([50, 50, 50]))
    assert torch.equal(selected[50:100], select_cumulative(small.float(), gamma))
