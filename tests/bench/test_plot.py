"""The picture of the benchmark: a title that fits, whatever was measured."""

from __future__ import annotations

import pytest

from flexprefill_compile.bench.plot import create_figure


@pytest.mark.parametrize("num_panels", [1, 2, 4])
def test_a_long_title_fits(num_panels: int) -> None:
    figure = create_figure(num_panels, "NVIDIA H100 80GB HBM3, torch 2.13.0, bfloat16, heads [32, 8], head dim 128")
    figure.add_subplot()
    figure.draw_without_rendering()
    extent = figure._suptitle.get_window_extent()
    assert figure.bbox.contains(*extent.p0)
    assert figure.bbox.contains(*extent.p1)
