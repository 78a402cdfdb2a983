"""The launcher: arguments go by name, a second launch compiles nothing, smaller tiles follow where one does not fit."""

from __future__ import annotations

import functools
from typing import Any

import pytest

launch = pytest.importorskip("flexprefill_compile.block_masks.kernels.launch", reason="needs Triton")
triton = pytest.importorskip("triton")


class Kernel:
    """Stands in for a Triton kernel and, once launched, for what it was compiled to."""

    arg_names = ("query", "length", "BLOCK")

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **named: Any) -> Kernel:
            self.calls.append((grid, arguments, named))
            return self

        return run


def test_arguments_reach_the_kernel_by_name_in_any_order() -> None:
    kernel = Kernel()
    launcher = launch.Launcher(object())
    launcher.run(kernel, (2, 3), {"BLOCK": 16, "query": "q", "length": 5}, num_warps=4)
    launcher.run(kernel, (7,), {"length": 6, "BLOCK": 16, "query": "other"}, num_warps=4)
    assert kernel.calls == [
        ((2, 3), (), {"BLOCK": 16, "query": "q", "length": 5, "num_warps": 4, "num_stages": 3}),
        ((7, 1, 1), ("other", 6, 16), {}),
    ]


def test_launches_of_another_signature_or_variant_compile_anew() -> None:
    kernel, signature = Kernel(), object()
    arguments = {"query": "q", "length": 5, "BLOCK": 16}
    for key, variant in [(signature, 0), (signature, 1), (object(), 0), (signature, 1)]:
        launch.Launcher(key).run(kernel, (1,), arguments, num_warps=2, most_registers=128, variant=variant)
    assert [bool(named) for _, _, named in kernel.calls] == [True, True, True, False]
    assert kernel.calls[0][2]["maxnreg"] == 128


def _need(limit: int, tiles: int) -> int:
    if tiles > limit:
        raise triton.OutOfResources(tiles, limit, "shared memory")
    return tiles


def test_the_first_tiles_that_fit_are_used(caplog: pytest.LogCaptureFixture) -> None:
    def run(limit: int) -> Any:
        return launch.run_first_that_fits((functools.partial(_need, limit, n) for n in (8, 4, 2)), "blocks are scored")

    assert run(5) == 4
    assert not caplog.records
    assert run(1) is None
    (record,) = caplog.records
    assert record.getMessage().startswith("blocks are scored by plain PyTorch, slower: out of resource: shared memory")
